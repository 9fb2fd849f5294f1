"""Reads published weights: one file per layout, and the rules and readers that layouts share."""

from tokenvit_jax.errors import UserError
from tokenvit_jax.models import create_model
from tokenvit_jax.weights import clip, dinov2, google, huggingface, segmenter, swin, timm_vit
from tokenvit_jax.weights.files import read_arrays
from tokenvit_jax.weights.rules import Layout, export_weights, import_weights, parameter_shapes

LAYOUTS = {  # name of a layout -> family of models -> its layout
    "timm": {
        "vit": timm_vit.LAYOUT_VIT,
        "deit": timm_vit.LAYOUT_DEIT,
        "swin": swin.TIMM,
        "swinv2": swin.TIMM_V2,
    },
    "swin": {"swin": swin.OFFICIAL, "swinv2": swin.OFFICIAL_V2},
    "google": {"vit": google.LAYOUT},
    "dinov2": {"vit": dinov2.LAYOUT},
    "clip": {"vit": clip.LAYOUT},
    "huggingface": {
        "vit": huggingface.LAYOUT_VIT,
        "deit": huggingface.LAYOUT_DEIT,
        "swin": huggingface.LAYOUT_SWIN,
        "swinv2": huggingface.LAYOUT_SWINV2,
    },
    "segmenter": {
        "vit": segmenter.LAYOUT_VIT,
        "deit": segmenter.LAYOUT_DEIT,
    },
}


def find_layout(name: str, model: str) -> Layout:
    """Returns the layout of a model's family.

    Args:
      name: a key of LAYOUTS.
      model: name of a registered model.

    Raises:
      UserError: there is no such model, or the layout does not cover its family.
    """
    create_model(model)  # raises UserError for an unknown name
    families, family = LAYOUTS[name], model.split("_")[0]
    if family not in families:
        raise UserError(f"--layout={name} has no model {model!r}; valid: {', '.join(families)}")
    return families[family]


__all__ = [
    "LAYOUTS", "Layout", "export_weights", "find_layout", "import_weights", "parameter_shapes",
    "read_arrays",
]  # fmt: skip
