"""Reads published weights: one file per layout, and the rules and readers that layouts share."""

import re
from collections import Counter

from tokenvit_jax.errors import UserError
from tokenvit_jax.models import create_model, list_models
from tokenvit_jax.models.registry import model_settings
from tokenvit_jax.weights import (
    clip,
    dinov2,
    dpt,
    google,
    huggingface,
    mask2former,
    mmdet,
    mmseg,
    segmenter,
    swin,
    timm_vit,
)
from tokenvit_jax.weights.files import INDEX, SUFFIXES, check_file, read_arrays
from tokenvit_jax.weights.rules import (
    Arrays,
    Layout,
    export_variables,
    export_weights,
    import_variables,
    import_weights,
    parameter_shapes,
    shown,
)

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
    "dpt": {"vit": dpt.LAYOUT, "deit": dpt.LAYOUT},
    "mmseg": {"swin": mmseg.VERSION_1},
    "mmseg0": {"swin": mmseg.VERSION_0},
    "mmdet": {"swin": mmdet.MMDET},
    "swin_detection": {"swin": mmdet.SWIN},
    "mask2former": {"swin": mask2former.DETECTRON2},
    "mask2former_hub": {"swin": mask2former.HUB},
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


def layouts_of(model: str, task: str | None = None) -> list[str]:
    """Returns the names of the layouts that cover a model's family, and a task if it is given.

    Raises:
      UserError: there is no such model, or no layout covers its family.
    """
    create_model(model)
    family = model.split("_")[0]
    found = [
        name
        for name, families in LAYOUTS.items()
        if family in families and task in (None, families[family].task)
    ]
    if not found:
        known = dict.fromkeys(
            name
            for families in LAYOUTS.values()
            for name, layout in families.items()
            if task in (None, layout.task)
        )
        purpose = "" if task is None else f" for {task}"
        raise UserError(f"no layout has the model {model!r}{purpose}; valid: {', '.join(known)}")
    return found


def recognise_layout(arrays: Arrays, model: str) -> str:
    """Returns the name of the layout that a file of weights of some model has.

    Args:
      arrays: published name -> array.
      model: name of a registered model.

    Raises:
      UserError: the names of the arrays fit no layout; the message names the nearest one.
    """

    def missing(name):
        return find_layout(name, model).missing_marks(arrays)

    # Of the layouts that fit, the one with the most marks: timm's are among DINOv2's.
    names = layouts_of(model)
    names.sort(key=lambda name: -len(find_layout(name, model).marks))
    best = min(names, key=lambda name: len(missing(name)))
    if lacking := missing(best):
        have = ", ".join(map(shown, sorted(arrays)[:3]))
        raise UserError(
            f"the names of its {len(arrays)} arrays ({have}, ...) fit no layout of {model}; the "
            f"nearest is --layout={best}, which has {lacking[0]}; valid: "
            f"{', '.join(layouts_of(model))}"
        )
    return best


def similar_models(arrays: Arrays) -> list[str]:
    """Returns the models that a file of weights may belong to.

    Args:
      arrays: published name -> array.

    Returns:
      Names of the models with a layout that fits the names, as many channels after the patch
      embedding, and as many blocks.
    """
    kernels = [array.shape for array in arrays.values() if array.ndim == 4]
    # Kernels for RGB images: (C, 3, rows, columns), or (rows, columns, 3, C).
    widths = {shape[0] for shape in kernels if shape[1] == 3}
    widths |= {shape[-1] for shape in kernels if shape[2] == 3}
    norms = [name for name in arrays if re.search(r"norm|ln_", name.lower())]
    blocks = Counter(re.sub(r"(?<=\.|_)\d+(?=\.|/LayerNorm_0)", "0", x) for x in norms).values()

    def is_similar(name):
        settings = model_settings(name)
        stem = getattr(settings, "stem", None)
        width = stem.first if stem else getattr(settings, "dim", None) or settings.dims[0]
        layouts = (families.get(name.split("_")[0]) for families in LAYOUTS.values())
        return (
            width in widths
            and settings.num_blocks in blocks
            and not all(layout is None or layout.missing_marks(arrays) for layout in layouts)
        )

    return [name for name in list_models() if is_similar(name)]


__all__ = [
    "INDEX", "LAYOUTS", "SUFFIXES", "Arrays", "Layout", "check_file", "export_variables",
    "export_weights", "find_layout", "import_variables", "import_weights", "layouts_of",
    "parameter_shapes", "read_arrays", "recognise_layout", "similar_models",
]  # fmt: skip
