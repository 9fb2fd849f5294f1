"""Models by name: a registered function returns the module of one published size."""

import dataclasses
import fnmatch
from collections.abc import Callable

import flax.linen as nn
import jax

from tokenvit_jax.errors import UserError, did_you_mean

MIN_IMAGE_SIZE = 32  # the stride of the last stage

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Adds a function ``builder(**overrides) -> module`` under its own name."""
    _BUILDERS[builder.__name__] = builder
    return builder


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of all models that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(_BUILDERS, pattern))


def create_model(name: str, *, num_classes: int = 1000, **overrides) -> nn.Module:
    """Creates a model of a published size.

    Args:
      name: one of :func:`list_models`.
      num_classes: size of the logits.
      **overrides: attributes of the module that differ from the published ones.

    Returns:
      A linen module; ``model.init(rng, images, train=False)`` with images (B, H, W, 3).

    Raises:
      UserError: an unknown name or override; the message lists the valid ones.
    """
    if name not in _BUILDERS:
        hint = did_you_mean(name, _BUILDERS)
        raise UserError(f"unknown model {name!r}{hint}; valid: {', '.join(list_models())}")
    model = _BUILDERS[name](num_classes=num_classes)
    valid = sorted(f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name"))
    for key, value in overrides.items():
        if key not in valid:
            hint = did_you_mean(key, valid)
            raise UserError(f"model {name} has no setting {key!r}{hint}; valid: {', '.join(valid)}")
        default = getattr(model, key)
        if isinstance(default, tuple) and len(value) != len(default):
            raise UserError(f"{key} of model {name} is {value}; it needs {len(default)} entries")
    return model.clone(**overrides)


def check_images(images: jax.Array) -> None:
    """Raises UserError unless images are (B, H, W, 3) with H, W of at least 32."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"images have shape {images.shape}; expected (batch, height, width, 3)")
    height, width = images.shape[1:3]
    if min(height, width) < MIN_IMAGE_SIZE:
        raise UserError(
            f"images are {height} x {width}; height and width must be at least {MIN_IMAGE_SIZE}"
        )
