"""Converts published weights to a run of this project, and back.

    python -m tokenvit_jax.convert --model=deit_s --source=FILE --out=WORKDIR
    python -m tokenvit_jax.convert --source=WORKDIR --out=FILE.safetensors

FILE is a safetensors file, a file of torch.save (read without running code; needs PyTorch), a NumPy
archive of Google's ViT, the index of weights in several files (*.index.json), or a folder of
Hugging Face's with such a file. WORKDIR becomes a run at step 0: predict, evaluate and train read
it like any other run.

--layout names the code base whose names the arrays have; by default the names decide:

    timm            vit, deit, swin, swinv2 of timm, also its DINOv2 and CLIP
    swin            Swin and Swin v2 of microsoft/Swin-Transformer
    google          vit of google-research/vision_transformer (.npz)
    dinov2          vit of facebookresearch/dinov2
    clip            image towers (ViT) of openai/CLIP and open_clip
    huggingface     ViT, DeiT, DINOv2, CLIP, Swin and Swin v2 of transformers
    segmenter       vit and deit of rstrudel/segmenter, with either decoder
    mmseg           swin with UperNet or Semantic FPN of mmsegmentation 1.x
    mmseg0          the same of mmsegmentation 0.x, such as Swin's own code for segmentation
    mmdet           swin with RetinaNet, Mask R-CNN or HTC of mmdetection 3.x
    swin_detection  the same of Swin's own code for detection
    mask2former     swin with Mask2Former of facebookresearch/Mask2Former (also .pkl)
    mask2former_hub the same of transformers

The arrays determine the settings of the model and the number of classes. A file without a
classifier becomes a run without one, from which training can start. 1000 classes are ImageNet's;
--dataset names others, and without it they have numbers. --num_classes=0 leaves the classifier out.
--ema reads the moving average of a training checkpoint in place of its last weights.

The command prints what the file does not determine, and the flags that set it: --normalization,
--eval_crop, --eval_interpolation, and settings of the model, as --override=NAME=VALUE.

When converting back, --checkpoint is last, best (highest accuracy or mIoU) or a step.

--layout=own keeps the names of this project, for every model. Such a file also holds the run's
configuration, so no other flag is needed to turn it into a run again:

    python -m tokenvit_jax.convert --layout=own --source=WORKDIR --out=FILE.safetensors
    python -m tokenvit_jax.convert --source=FILE.safetensors --out=NEW_WORKDIR

Segmenter: the position embeddings fit the crops of the training, and the images and windows of the
run (`image_size`, `inference.window`) get the size of these crops. The file holds neither the
stride of the windows nor the sizes of the evaluation images (`data.eval_short_side`, `eval_size`,
`label_size`): give evaluate a --config with these entries. The encoder's classifiers, encoder.head
and encoder.head_dist, are dropped, because no mask depends on them. An exported file lacks them, so
the authors' code must load it with load_state_dict(..., strict=False).

mmsegmentation: the run sees images whole, with a shorter side of 512 pixels, as in the published
evaluation. The sizes of label maps (`data.label_size`) are not in the file.

mmdetection: images have a shorter side of 800 pixels and a longer one of at most 1333, as in the
published evaluation, and lie in a canvas of 800 x 1344 pixels, or 1344 x 800.

Mask2Former: a file with 150 or 100 classes is one for ADE20K, any other one for COCO, and the sizes
of images in training and evaluation are those of its recipe. The numbers of classes and queries
tell what it was trained for, but smaller models for ADE20K have 100 queries in all tasks: with 150
classes they become semantic, and evaluate takes another `inference.kind`.
"""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from tokenvit_jax import cli, slurm
from tokenvit_jax.data import INTERPOLATIONS, NORMALIZATIONS
from tokenvit_jax.errors import UserError
from tokenvit_jax.training.checkpoint import FOLDER
from tokenvit_jax.training.conversion import AUTO, Choices, export_run, import_file
from tokenvit_jax.training.own_weights import OWN, convert_own, means_own
from tokenvit_jax.training.workdir import has_config
from tokenvit_jax.weights import INDEX, LAYOUTS, SUFFIXES, check_file

_HUGGING_FACE = ("model.safetensors", "pytorch_model.bin")  # files of weights in its folders

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "model", None, "name of the model; not needed when converting back", flag_values=FLAGS
)
flags.DEFINE_enum(
    "layout",
    AUTO,
    [AUTO, *LAYOUTS, OWN],
    "names and shapes of the arrays in the file; auto: the names decide; when converting back, the "
    "first layout that has the model",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "source", None, "file of weights; when converting back, workdir of a run", flag_values=FLAGS
)
flags.DEFINE_string(
    "out", None, "workdir of the new run; when converting back, a file", flag_values=FLAGS
)
flags.DEFINE_string(
    "dataset", None, "dataset with the names of the classes; default: imagenet2012 for 1000 "
    "classes, else none", flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("data_dir", None, "folder of a dataset that is not built in", flag_values=FLAGS)
flags.DEFINE_integer(
    "num_classes", None, "number of classes; 0: leave the classifier out; default: the file's",
    lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool("ema", False, "read the moving average of the weights", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "override", [], "NAME=VALUE, a setting of the model that the file does not tell; may be given "
    "several times", flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_enum(
    "normalization",
    None,
    list(NORMALIZATIONS),
    "pixel normalisation that the weights were trained with; default: the layout's most common one",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "eval_crop", None, "side of the centre crop / resized shorter side in evaluation; default: "
    "that of the published models", flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_enum(
    "eval_interpolation", None, list(INTERPOLATIONS), "how evaluation resizes images; default: "
    "that of the published models", flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("checkpoint", "last", "last, best or a step", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Writes the run or the file."""
    slurm.check_one_task("convert")
    source, out = weights_file(Path(flag_values.source)), Path(flag_values.out)
    lines = []
    if not source.is_dir():
        check_file(source)
        if flag_values["checkpoint"].present:
            raise UserError(f"--checkpoint has no effect: --source={source} is a file, not a run")
    own = means_own(flag_values.layout, source)
    if own or source.is_dir():
        _refuse_choices(flag_values, source)
    if own:
        convert_own(source, out, flag_values.checkpoint)
    elif source.is_dir():
        lines = export_run(source, out, flag_values.layout, flag_values.checkpoint)
    elif flag_values.model is None:
        raise UserError("--model is missing: the file does not name its model")
    else:
        names = [name for name in Choices._fields if name != "model_overrides"]
        choices = {name: flag_values[name].value for name in names}
        overrides = parse_overrides(flag_values.override)
        choices = Choices(**choices, model_overrides=overrides)
        lines = import_file(source, out, flag_values.model, flag_values.layout, choices)
    print(*lines, f"{source} -> {out}", sep="\n")


def _refuse_choices(flag_values: flags.FlagValues, source: Path) -> None:
    """Raises UserError for a flag about a published file where the source knows the answer."""
    names = {"model_overrides": "override"}
    for name in ("model", *(names.get(field, field) for field in Choices._fields)):
        if flag_values[name].present:
            raise UserError(
                f"--{name} has no effect: --source={source} holds the configuration of its run"
            )


def weights_file(source: Path) -> Path:
    """Returns the file of weights in a folder of Hugging Face's, or the source itself.

    Of weights in several files, it is their index.

    Raises:
      UserError: the folder holds neither such a file nor a run.
    """
    if not source.is_dir():
        return source
    names = [f"{name}{end}" for name in _HUGGING_FACE for end in ("", INDEX)]
    for path in (source / name for name in names):
        if path.is_file():
            return path
    if has_config(source) or (source / FOLDER).is_dir():
        return source
    inside = sorted(path.name for path in source.iterdir() if path.suffix in SUFFIXES)
    hint = f"; it holds {', '.join(inside[:5])}" if inside else ""
    raise UserError(
        f"--source={source} holds neither a run nor {' or '.join(_HUGGING_FACE)}; valid: the "
        f"workdir of a run, or a file of weights{hint}"
    )


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Returns settings by name from texts "NAME=VALUE"; a value that is no literal is a string.

    Raises:
      UserError: a text has another form, or a name occurs twice.
    """
    overrides = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals):
            raise UserError(f"--override={text} is not valid; valid: NAME=VALUE")
        if name in overrides:
            raise UserError(f"--override={name} is given twice; valid: once")
        try:
            overrides[name] = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            overrides[name] = value
    return overrides


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("source", "out"))
