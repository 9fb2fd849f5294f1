"""The contract of every backbone, and of every model that wraps one."""

import abc
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer

from tokenvit_jax.errors import UserError
from tokenvit_jax.kernels.platforms import default_forms
from tokenvit_jax.layers.blocks import dense
from tokenvit_jax.layers.conv import linear_init
from tokenvit_jax.models.settings import BackboneSettings
from tokenvit_jax.ops.packed import cast_packed

MIN_IMAGE_SIZE = 32  # stride of the last stage of a hierarchical backbone
BACKBONE = "backbone"  # name of a wrapped backbone in the paths of variables

Variables = Mapping[str, Any]


class Encoded(NamedTuple):
    """Tokens for a dense head, and the function back to the map of all patches.

    Attributes:
      tokens: (B, n, C); n may be smaller than the number of patches.
      restore: function that maps the head's output for these tokens to the map,
        (B, n, D) -> (B, h, w, D).
    """

    tokens: jax.Array
    restore: Callable[[jax.Array], jax.Array]


class Tap(NamedTuple):
    """Tokens after a block, before the last LayerNorm.

    Attributes:
      map: the patches (B, h, w, C).
      front: the tokens in front of the patches (B, f, C): the class token, then the distillation
        token, then registers; None: a map of the stem, which has no tokens.
    """

    map: jax.Array
    front: jax.Array | None


class Trainable(nn.Module):
    """Methods that a training step calls on every model; these defaults do nothing.

    The methods are plain functions of variables and paths: call them outside ``apply``.
    """

    @property
    def num_layers(self) -> int:
        """Number of layers that :meth:`layer_of` tells apart."""
        return 1

    @property
    def local_statistics(self) -> bool:
        """Whether devices have different running statistics until the step averages them."""
        return False

    @nn.nowrap
    def layer_of(self, path: str) -> int:
        """Returns the layer of a variable, from 0 at the images to ``num_layers - 1`` at the head.

        Layer-wise decay of the learning rate uses it.

        Args:
          path: names joined by "/", such as "blocks_3/mlp/fc1/kernel".
        """
        del path
        return 0

    @nn.nowrap
    def is_head(self, path: str) -> bool:
        """Returns whether a variable belongs to the classifier or head, not to the backbone.

        Args:
          path: as in :meth:`layer_of`.
        """
        del path
        return False

    @nn.nowrap
    def after_step(self, variables: Variables, learning_rate: jax.Array) -> Variables:
        """Returns the variables after the model's own update, once per optimizer step.

        Args:
          variables: {"params": ..., and the model's other collections}, after the optimizer.
          learning_rate: learning rate of the step ().
        """
        del learning_rate
        return variables

    @nn.nowrap
    def learning_rate_factors(self, params: Any) -> Any:
        """Returns a tree of floats like ``params``, the factors on their learning rates.

        None means 1 for all parameters.
        """
        del params
        return None

    @nn.nowrap
    def monitor(self, params: Any) -> dict[str, jax.Array]:
        """Returns scalars to log that are computed from the parameters, by name."""
        del params
        return {}

    @nn.nowrap
    def cast_weights(self, params: Any, *, convolutions: bool = False) -> Any:
        """Returns the parameters, some of them already in the type of the computation.

        The model would cast each of them where it is used; here few operations cast all.

        Args:
          params: parameters.
          convolutions: whether to cast the kernels of convolutions, too. Where they are used, a
            cast is a part of a change of the layout; here it halves the bytes that travel.
        """
        del convolutions
        return params

    @nn.nowrap
    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:
        """Applies the model to variables as `nn.Module.apply` does, after :meth:`cast_weights`."""
        if "params" in variables:
            variables = {**variables, "params": self.cast_weights(variables["params"])}
        return super().apply(variables, *args, **kwargs)


class Backbone(Trainable, abc.ABC):
    """A classifier whose maps also serve other tasks.

    In training, any linen module may call ``self.sow("losses", name, scalar)``; the step adds the
    sum of the collection "losses" to the loss. Nothing is sown while the parameters are
    initialised.

    Attributes:
      settings: the architecture. ``clone`` also accepts single settings by name:
        ``model.clone(drop_path=0.1)``.
      head_modules: names of the submodules that only the classifier uses.
      first_layer: path of the module with the convolution of the images; "": the channels of
        images are not checked.
      optional_parameters: ends of the paths of parameters that exist only with some settings. Runs
        that differ in these parameters can start from each other.
      map_norm_epsilon: epsilon of the LayerNorm that segmentation with convolutional heads applies
        to each map of :meth:`features`; None: no norm.
      has_normed_maps: whether the maps of :meth:`features` end in a LayerNorm, so that detectors
        apply none to them.
      float32_parameters: pattern in the paths of kernels (n, m) and their biases that enter the
        computation in float32, so that :meth:`cast_weights` leaves them: layers in float32, and
        layers that an operator joins with a BatchNorm or a convolution.
      standardized_kernels: pattern at the start of the paths of kernels that are standardised, in
        float32, and not cast before that; None: there are none.
    """

    settings: BackboneSettings

    head_modules: ClassVar[tuple[str, ...]] = ("classifier",)
    first_layer: ClassVar[str] = ""
    optional_parameters: ClassVar[tuple[str, ...]] = ()
    map_norm_epsilon: ClassVar[float | None] = None
    has_normed_maps: ClassVar[bool] = False
    float32_parameters: ClassVar[str] = "classifier|position_bias|pointwise|ffn/reduce|ffn/.*/bias"
    standardized_kernels: ClassVar[str | None] = None

    @property
    def local_statistics(self) -> bool:
        return getattr(self.settings, "batch_norm", "global") != "global"

    @nn.nowrap
    def cast_weights(self, params: Any, *, convolutions: bool = False) -> Any:
        dtype = jnp.dtype(self.settings.dtype)
        if dtype.itemsize >= 4:
            return params
        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        places = [
            i
            for i, (path, leaf) in enumerate(leaves)
            if leaf.dtype == jnp.float32
            and (self._is_cast(path, params) or (convolutions and self._is_convolution(path, leaf)))
        ]
        if not places:
            return params
        leaves = [leaf for _, leaf in leaves]
        for i, leaf in zip(places, cast_packed([leaves[i] for i in places], dtype), strict=True):
            leaves[i] = leaf
        return structure.unflatten(leaves)

    @nn.nowrap
    def _is_cast(self, path, params):
        """Returns whether a linear layer uses a parameter in the type of the computation only."""
        *modules, name = [part.key for part in path]
        layer = params
        for module in modules:
            layer = layer[module]
        linear = name in ("kernel", "bias") and getattr(layer.get("kernel"), "ndim", 0) == 2
        return linear and not re.search(self.float32_parameters, "/".join((*modules, name)))

    @nn.nowrap
    def _is_convolution(self, path, leaf):
        """Returns whether a convolution uses a kernel in the type of the computation only."""
        names = "/".join(part.key for part in path)
        standardized = self.standardized_kernels
        kept = standardized is not None and re.match(standardized, names)
        return path[-1].key == "kernel" and leaf.ndim == 4 and not kept

    @nn.nowrap
    def check_images(self, images: Any) -> None:
        """Raises UserError unless this model, with its variables, can be applied to images."""
        check_images(images)
        layer = self.variables.get("params", {})
        for name in self.first_layer.split("/"):
            layer = layer.get(name, {})
        for kernel in (leaf for leaf in jax.tree.leaves(layer) if leaf.ndim == 4):
            if images.shape[3] != kernel.shape[2]:
                raise UserError(
                    f"images have {images.shape[3]} channels; the model was initialised for "
                    f"{kernel.shape[2]}"
                )

    @nn.nowrap
    def clone(self, **updates) -> "Backbone":
        """Returns a copy with other attributes or settings."""
        names = {field.name for field in dataclasses.fields(self.settings)}
        changed = {name: updates.pop(name) for name in names & updates.keys()}
        if changed:
            settings = updates.get("settings", self.settings)
            updates["settings"] = dataclasses.replace(settings, **changed)
        return super().clone(**updates)

    @property
    def num_layers(self) -> int:
        """The input layers, one layer per block, and the last one with the head."""
        return self.settings.num_blocks + 2

    @nn.nowrap
    def is_head(self, path: str) -> bool:
        return path.split("/")[0] in self.head_modules

    @nn.nowrap
    def fit_parameter(self, path: str, value: np.ndarray, theirs: "Backbone") -> np.ndarray:
        """Returns a parameter of another model of this family in the size that it has here.

        Tables of positions are resized; a parameter of any other kind is returned as it is.

        Args:
          path: as in :meth:`layer_of`.
          value: parameter of the other model.
          theirs: the other model.
        """
        del path, theirs
        return value

    @property
    @abc.abstractmethod
    def strides(self) -> tuple[int, ...]:
        """Strides of the maps of :meth:`features` [pixels]; :meth:`encode` has the first one."""

    @abc.abstractmethod
    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """Returns one map (B, ceil(H / stride), ceil(W / stride), C) for every stride.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: whether BatchNorm, dropout and routing behave as in training.
        """

    @abc.abstractmethod
    def encode(self, images: jax.Array, train: bool = False) -> Encoded:
        """Returns tokens for a dense head, and the function from its output back to a map.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: as in :meth:`features`.
        """

    def maps(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """Returns :meth:`features`; a model of another task returns what its head reads."""
        return self.features(images, train)

    @abc.abstractmethod
    def pooled(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the features that the classifier reads, (B, C) in float32.

        A model with ``num_classes=0`` has no classifier and returns them in place of logits.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: as in :meth:`features`.
        """

    def taps(
        self,
        images: jax.Array,
        train: bool = False,
        blocks: Sequence[int] | None = None,
        stages: Sequence[int] = (),
    ) -> list[Tap]:
        """Returns maps of the stem, and the tokens after some blocks.

        Args:
          images: (B, H, W, 3) float, H and W from 32.
          train: as in :meth:`features`.
          blocks: the blocks, counted from 0; None: all.
          stages: the stages of the stem, counted from 0.

        Raises:
          UserError: the backbone is hierarchical.
        """
        del images, train, blocks, stages
        raise UserError(
            f"{type(self).__name__} is hierarchical and has no taps; valid: deit and vit, or the "
            "maps of its method features"
        )

    @nn.nowrap
    def attention(self, variables: Variables, images: jax.Array) -> list[jax.Array]:
        """Returns the attention of every block, (B, heads, T, T) among the T tokens of the block.

        The tokens in front of the patches come first. Rows are queries and sum to 1. Blocks have
        different tokens if the model clusters or reduces its patches. A plain function of the
        variables: call it outside ``apply``.

        Args:
          variables: of this backbone.
          images: (B, H, W, 3) float, H and W from 32.

        Raises:
          UserError: the backbone is hierarchical: no block attends among all its tokens.
        """
        del variables, images
        raise UserError(
            f"{type(self).__name__} is hierarchical and has no attention among all tokens; valid: "
            "deit and vit"
        )

    @nn.nowrap
    def make_classifier(self, init: Initializer = linear_init) -> nn.Dense | None:
        """Returns a classifier of ``num_classes`` logits; None if there are no classes."""
        num_classes = self.settings.num_classes
        return dense(num_classes, jnp.float32, init=init) if num_classes else None

    def classify(
        self, pooled: jax.Array, train: bool, classifier: nn.Dense | None = None
    ) -> jax.Array:
        """Returns the logits (B, num_classes) of pooled features (B, C), both float32.

        Without classes it returns the pooled features.

        Args:
          pooled: result of :meth:`pooled`.
          train: whether dropout behaves as in training.
          classifier: result of :meth:`make_classifier`; None: the model's own.
        """
        if not self.settings.num_classes:
            return pooled
        return (classifier or self.classifier)(self.head_dropout(pooled, train))


class BackboneModel(Trainable):
    """A model of any task around a backbone; passes the calls of a training step to the backbone.

    Attributes:
      backbone: the wrapped backbone, whose variables are under "backbone" in every collection.
      unread_modules: names of the backbone's submodules that this model does not use, and whose
        variables it does not have, besides the classifier.
    """

    unread_modules: ClassVar[tuple[str, ...]] = ()

    backbone: nn.Module

    def maps(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """Returns the maps of the backbone that the head reads, with all patches.

        They are those of its method `features`, unless a head reads others.
        """
        return self.backbone.features(images, train)

    @property
    def multiple(self) -> int:
        """The sides of images are multiples of this number of pixels."""
        return 1

    @property
    def num_layers(self) -> int:
        return self.backbone.num_layers

    @property
    def local_statistics(self) -> bool:
        return self.backbone.local_statistics

    @nn.nowrap
    def layer_of(self, path: str) -> int:
        if self.is_head(path):
            return self.num_layers - 1
        return self.backbone.layer_of(path.removeprefix(f"{BACKBONE}/"))

    @nn.nowrap
    def is_head(self, path: str) -> bool:
        return path.split("/")[0] != BACKBONE

    @nn.nowrap
    def cast_weights(self, params: Any, *, convolutions: bool = False) -> Any:
        cast = self.backbone.cast_weights(params[BACKBONE], convolutions=convolutions)
        return {**params, BACKBONE: cast}

    @nn.nowrap
    def after_step(self, variables: Variables, learning_rate: jax.Array) -> Variables:
        moved = self.backbone.after_step(backbone_variables(self, variables), learning_rate)
        return {
            name: {**tree, "backbone": moved[name]} if name in moved else tree
            for name, tree in variables.items()
        }

    @nn.nowrap
    def learning_rate_factors(self, params: Any) -> Any:
        factors = self.backbone.learning_rate_factors(params["backbone"])
        if factors is None:
            return None
        return {**jax.tree.map(lambda _: 1.0, dict(params)), "backbone": factors}

    @nn.nowrap
    def monitor(self, params: Any) -> dict[str, jax.Array]:
        return self.backbone.monitor(params["backbone"])


def backbone_of(model: nn.Module) -> nn.Module:
    """Returns the backbone that a model wraps, or the model itself."""
    return model.backbone if isinstance(model, BackboneModel) else model


def backbone_variables(model: nn.Module, variables: Variables) -> Variables:
    """Returns the variables of :func:`backbone_of` from the variables of the model."""
    if not isinstance(model, BackboneModel):
        return variables
    return {name: tree["backbone"] for name, tree in variables.items() if "backbone" in tree}


def variable_shapes(model: nn.Module, images: Any) -> Any:
    """Returns the shapes and types of a model's variables without computing anything.

    Args:
      model: linen module, called as ``model(images, train=False)``.
      images: (B, H, W, 3), an array or a `jax.ShapeDtypeStruct`.

    Returns:
      A tree of `jax.ShapeDtypeStruct` like the result of ``model.init``.
    """
    with default_forms():
        return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)


def check_images(images: Any) -> None:
    """Raises UserError unless images are (B, H, W, C) float with H and W of at least 32."""
    shape, dtype = getattr(images, "shape", None), getattr(images, "dtype", None)
    if shape is None or len(shape) != 4:
        found = f"shape {shape}" if shape is not None else f"type {type(images).__name__}"
        raise UserError(f"images have {found}; expected (batch, height, width, channels)")
    if shape[0] == 0 or shape[3] == 0:
        raise UserError(f"images have shape {shape}; expected at least one image and one channel")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"images have type {dtype}; expected floating point, normalised")
    height, width = images.shape[1:3]
    if min(height, width) < MIN_IMAGE_SIZE:
        raise UserError(
            f"images are {height} x {width}; height and width must be at least {MIN_IMAGE_SIZE}"
        )
