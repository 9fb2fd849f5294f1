"""Registry of the models by name, with the published sizes of every family."""

import dataclasses
import fnmatch
from collections.abc import Mapping

from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.models import clustr, dgt, pale, swin, vit
from tokenvit_jax.models.backbone import Backbone
from tokenvit_jax.models.settings import BackboneSettings
from tokenvit_jax.valid import shown

_MODELS: dict[str, tuple[type[Backbone], BackboneSettings]] = {}


def register(cls: type[Backbone], sizes: Mapping[str, BackboneSettings]) -> None:
    """Adds models of one class: their names, and the settings of each."""
    _MODELS.update({name: (cls, settings) for name, settings in sizes.items()})


register(clustr.ClusTR, clustr.SIZES)
register(dgt.DGT, dgt.SIZES)
register(pale.Pale, pale.SIZES)
register(swin.Swin, swin.SIZES)
register(swin.SwinV2, swin.V2_SIZES)
register(vit.VisionTransformer, vit.SIZES)


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of all models that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def model_settings(name: str) -> BackboneSettings:
    """Returns the published settings of a model.

    Args:
      name: one of :func:`list_models`.

    Raises:
      UserError: there is no such model.
    """
    if not isinstance(name, str) or name not in _MODELS:
        hint = did_you_mean(name, _MODELS) if isinstance(name, str) else ""
        raise UserError(f"unknown model {shown(name)}{hint}; valid: {', '.join(list_models())}")
    return _MODELS[name][1]


def create_model(name: str, *, num_classes: int = 1000, **overrides) -> Backbone:
    """Creates a model of a published size.

    Args:
      name: one of :func:`list_models`.
      num_classes: number of logits; 0: no classifier, the model returns the pooled features (B, C).
      **overrides: settings that replace the published ones.

    Returns:
      A linen module; ``model.init(rng, images)`` with images (B, H, W, 3).

    Raises:
      UserError: the name or a setting is unknown, or a value is not valid.
    """
    settings = model_settings(name)
    valid = sorted(field.name for field in dataclasses.fields(settings))
    for key, value in overrides.items():
        if key not in valid:
            hint = did_you_mean(key, valid)
            raise UserError(f"model {name} has no setting {key!r}{hint}; valid: {', '.join(valid)}")
        default = getattr(settings, key)
        given = isinstance(default, tuple) and isinstance(value, tuple | list)
        if given and len(value) != len(default):
            raise UserError(
                f"{key} of model {name} is {shown(value)}; it needs {len(default)} entries"
            )
    cls, _ = _MODELS[name]
    return cls(dataclasses.replace(settings, num_classes=num_classes, **overrides))
