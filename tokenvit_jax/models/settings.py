"""Settings that all backbones share, and checks of settings that are given by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from tokenvit_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneSettings:
    """Settings that every backbone has.

    Attributes:
      num_classes: number of classes of the classifier; 0: there is none, and the model returns
        the pooled features.
      drop_path: stochastic depth rate of the last block; the rate grows linearly from 0 at the
        first block.
      dropout: dropout rate before the classifier.
      remat: whether to recompute the blocks in the backward pass instead of storing activations.
      dtype: type of the computation; parameters are float32.
      axis_name: mapped axis that the batch is split over, for pmap; None under jit.
    """

    num_classes: int = 1000
    drop_path: float = 0.0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the network."""
        raise NotImplementedError

    def drop_path_of(self, index: int) -> float:
        """Returns the stochastic depth rate of a block; ``index`` counts from 0."""
        return self.drop_path * index / max(self.num_blocks - 1, 1)


def read_settings(cls: type, name: str, settings: Any, depth: int) -> Any:
    """Returns ``settings`` as a checked instance of ``cls``; None if there are none.

    Args:
      cls: a dataclass with a method ``check(depth)``.
      name: the model's name for these settings, for error messages.
      settings: an instance of ``cls``, or its attributes by name.
      depth: number of blocks of the model.

    Raises:
      UserError: an attribute is unknown, missing or not valid.
    """
    if not settings:
        return None
    if isinstance(settings, Mapping):
        fields = dataclasses.fields(cls)
        valid = [field.name for field in fields]
        for key in settings:
            if key not in valid:
                raise UserError(f"{name} has no {key!r}; valid: {', '.join(valid)}")
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in settings:
                raise UserError(f"{name}.{field.name} is missing")
        settings = cls(**dict(settings))
    settings.check(depth)
    return settings


def check_choice(name: str, value: Any, valid: Any) -> None:
    """Raises UserError unless ``value`` is one of the ``valid`` ones."""
    if value not in valid:
        raise UserError(f"{name}={value!r} is not valid; valid: {', '.join(valid)}")
