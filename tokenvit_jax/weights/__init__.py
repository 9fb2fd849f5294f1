"""Reads published weights: one file per layout, and the rules and readers that layouts share."""

from tokenvit_jax.errors import UserError
from tokenvit_jax.models import create_model
from tokenvit_jax.weights import segmenter, timm_swin, timm_vit
from tokenvit_jax.weights.files import read_arrays
from tokenvit_jax.weights.rules import Layout, export_weights, import_weights, parameter_shapes

LAYOUTS = {  # name of a layout -> family of models -> its layout
    "timm": {
        "vit": timm_vit.LAYOUT,
        "deit": timm_vit.LAYOUT,
        "swin": timm_swin.LAYOUT,
        "swinv2": timm_swin.LAYOUT_V2,
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
