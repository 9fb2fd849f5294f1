"""Settings that all backbones share, and the check of every setting when it is given."""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.layers.blocks import check_num_heads
from tokenvit_jax.ops.batch_norm import DeviceGroups, SharedBy
from tokenvit_jax.valid import (
    Either,
    Flag,
    Number,
    OneOf,
    Rule,
    Several,
    Text,
    check_all,
    shown,
    whole,
)

Rules = Mapping[str, Rule]

# The highest values are far above those of any published model: a typing error ends in a message
# instead of a full memory.
CHANNELS = whole(1, 2**16)
HEADS = whole(1, 2**16)
EXPANSION = whole(1, 256)
RATE = Number(0, 1, below=True)
CLASSES = 10**7
BLOCKS = 1000
SIDE = whole(1, 2**15)  # of an image [pixels]
BATCH_NORM = Either((OneOf(("global", "local")), whole(1, 2**20)))


# ------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------


class FloatType(NamedTuple):
    """Types of numbers that the models compute with, or their names."""

    names: tuple[str, ...] = ("float32", "bfloat16", "float16", "float64")

    def accepts(self, value: Any) -> bool:
        if isinstance(value, type | np.dtype):
            try:
                value = jnp.dtype(value).name
            except TypeError:
                return False
        return isinstance(value, str) and value in self.names

    def __str__(self) -> str:
        return ", ".join(self.names)


class Part(NamedTuple):
    """None, or settings that have attributes of their own.

    Attributes:
      cls: class of these settings.
    """

    cls: type

    def accepts(self, value: Any) -> bool:
        return value is None or isinstance(value, self.cls)

    def __str__(self) -> str:
        names = ", ".join(field.name for field in dataclasses.fields(self.cls))
        return f"None, or values by name, of: {names}"


COMPUTATION: Rules = {
    "dtype": FloatType(),
    "axis_name": Either((OneOf((None,)), Text(empty=False), Several(Text(empty=False), length=2))),
}


@functools.cache
def rules_of(cls: type) -> dict[str, Rule]:
    """Returns the rules of a class and its bases, `valid`, by setting; the bases' come first."""
    rules = {}
    for base in reversed(cls.__mro__):
        rules |= vars(base).get("valid", {})
    return rules


class Checked:
    """Settings that are checked when they are made; a base of frozen dataclasses.

    Lists, which JSON has in place of tuples, become tuples, and numbers of NumPy those of Python:
    models can then be hashed, and a run's configuration written.

    Attributes:
      valid: rules of the settings that a class adds to those of its bases.
      prefix: precedes the names of settings in messages, such as "expedite.".
    """

    valid: ClassVar[Rules] = {}
    prefix: ClassVar[str] = ""

    def __post_init__(self):
        rules = rules_of(type(self))
        for name in rules:
            object.__setattr__(self, name, _plain(getattr(self, name)))
        check_all(self.prefix, vars(self), rules)


def _plain(value):
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


# ------------------------------------------------------------------------------------------------
# Settings of all backbones
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneSettings(Checked, abc.ABC):
    """Settings that every backbone has.

    Attributes:
      num_classes: number of classes of the classifier; 0: there is none, and the model returns
        the pooled features.
      drop_path: stochastic depth rate of the last block; the rate grows linearly from 0 at the
        first block.
      dropout: dropout rate before the classifier.
      remat: whether to recompute the blocks in the backward pass instead of storing activations.
      dtype: type of the computation; parameters are float32.
      axis_name: mapped axis or axes that the batch is split over; None: one device.
      parts: settings that have attributes of their own: name -> their class. A class has a method
        `check(depth)`, which raises UserError unless the part fits a number of blocks.
    """

    parts: ClassVar[Mapping[str, type]] = {}
    valid: ClassVar[Rules] = {
        "num_classes": whole(0, CLASSES),
        "drop_path": RATE,
        "dropout": RATE,
        "remat": Flag(),
        **COMPUTATION,
    }

    num_classes: int = 1000
    drop_path: float = 0.0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32
    axis_name: str | tuple[str, ...] | None = None

    def __post_init__(self):
        for name, cls in self.parts.items():
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, make_part(cls, name, value))
        super().__post_init__()
        if isinstance(self.dtype, str):
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        self.check_relations()

    def check_relations(self) -> None:
        """Raises UserError unless settings that are valid alone fit together."""

    @property
    @abc.abstractmethod
    def num_blocks(self) -> int:
        """Number of blocks of the network."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNormSettings(BackboneSettings):
    """Settings of backbones with BatchNorm.

    Attributes:
      batch_norm: images that its statistics are over in training: "global", all of a step;
        "local", those of each device; a number, those of so many devices. Running statistics are
        averaged over the devices.
    """

    valid: ClassVar[Rules] = {"batch_norm": BATCH_NORM}

    batch_norm: str | int = "global"

    @property
    def norm_axis(self) -> SharedBy:
        """Devices that share the statistics of BatchNorm."""
        return norm_axis(self.batch_norm, self.axis_name)


def norm_axis(batch_norm: str | int, axis_name: str | tuple[str, ...] | None) -> SharedBy:
    """Returns the devices that share the statistics of BatchNorm.

    Args:
      batch_norm: as in :class:`BatchNormSettings`.
      axis_name: mapped axis or axes that the batch is split over; None: one device.
    """
    if axis_name is None or batch_norm == "global":
        return axis_name
    return DeviceGroups(axis_name, 1 if batch_norm == "local" else batch_norm)


def make_part(cls: type, name: str, settings: Mapping[str, Any]) -> Any:
    """Returns settings that have attributes of their own.

    Args:
      cls: their class.
      name: the model's name for them, for error messages.
      settings: their attributes by name.

    Raises:
      UserError: an attribute is unknown, missing or not valid.
    """
    fields = dataclasses.fields(cls)
    valid = [field.name for field in fields]
    for key in settings:
        if key not in valid:
            hint = did_you_mean(key, valid) if isinstance(key, str) else ""
            raise UserError(f"{name} has no {shown(key)}{hint}; valid: {', '.join(valid)}")
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in settings:
            valid = rules_of(cls)[field.name]
            raise UserError(f"{name}.{field.name} is missing; valid: {valid}")
    return cls(**settings)


def check_heads(num_heads: int, channels: int, setting: str) -> None:
    """Raises UserError unless the channels that a setting gives can be divided into heads.

    Args:
      num_heads: number of heads.
      channels: number of channels.
      setting: the setting, such as "dim=192".
    """
    try:
        check_num_heads(num_heads, channels)
    except UserError as error:
        raise UserError(f"{error}, {setting}; valid: divisors of {channels}") from None


def check_unused(prefix: str, settings: Any, reason: str, names: tuple[str, ...]) -> None:
    """Raises UserError for the first setting that has no effect and differs from its default.

    Args:
      prefix: precedes the names in messages.
      settings: dataclass of the settings.
      reason: the setting that takes the effect away, such as "aggregation='grid'".
      names: settings without effect.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in names and value != field.default:
            raise UserError(
                f"{prefix}{field.name}={shown(value)} is not valid; valid: {field.default!r} with "
                f"{reason}, where it has no effect"
            )
