"""The files in `configs/`, their arguments, and a function that loads them."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

FOLDER = Path(__file__).parent.parent / "configs"
_LEVELS = tuple(f"level{number}" for number in range(8))
_ARGS = {
    "dgt": ("", "digits", "fashion_mnist"),
    "clustr": ("", "digits"),
    "pale": ("", "tokens", "digits", "digits_tokens"),
    "deit": (
        "", "search", "pooled", "distilled", "digits", "digits_search", "digits_pooled",
        "digits_distilled",
    ),
    "dpt": ("kitti", "nyu", "scenes"),
    "finetune": ("vit_b", "swin_t", "clustr_s", "vit_b,3680"),
    "swin": ("", "digits"),
    "swinv2": ("", "digits"),
    "htc": ("swinv2_l", "swinv2_l_48", "scenes"),
    "mask2former": (
        *(
            f"{task}_{model}"
            for task in ("coco_panoptic", "coco_instance", "ade20k_panoptic", "ade20k_semantic")
            for model in ("swin_t", "swin_s", "swin_b", "swin_l", "clustr_s", "dgt_t", "pale_t")
        ),
        "scenes", "scenes_instance", "scenes_semantic",
    ),
    "mask": (
        "clustr_s", "dgt_t", "dgt_s", "dgt_b", "pale_t", "pale_s", "pale_b", "swin_t", "swin_s",
        "swin_b", "swin_t_3x", "swin_s_3x", "swin_b_3x", "scenes",
    ),
    "pose": (
        "clustr_t", "clustr_s", "clustr_b", "dgt_t", "pale_t", "swin_t", "figures",
    ),
    "retinanet": ("clustr_s", "dgt_t", "pale_t", "swin_t", "scenes"),
    "upernet": (
        "clustr_s", "dgt_t", "dgt_s", "dgt_b", "pale_t", "pale_s", "pale_b", "swin_t", "swin_s",
        "swin_b", "scenes",
    ),
    "semantic": ("clustr_s", "swin_t", "scenes"),
    "segmenter": ("", "pascal_context", "cityscapes", "scenes"),
}  # fmt: skip
_OWN_ARGS = {"dgt_t": ("swin_block", "cswin_block", "cmt_block")}
CASES = [
    (path.stem, arg)
    for path in sorted(FOLDER.glob("*.py"))
    for arg in (*_ARGS[path.stem.split("_")[0]], *_OWN_ARGS.get(path.stem, ()))
]
# Stage 3 of Token Pooling with the paper's numbers of tokens.
LEVELS = [(name, arg) for name in ("deit_s", "deit_e318", "deit_e252") for arg in _LEVELS]


def load_config(name: str, arg: str = "") -> ConfigDict:
    """Returns the configuration that `--config=configs/NAME.py:ARG` loads."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)
