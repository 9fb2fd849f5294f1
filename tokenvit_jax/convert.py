"""Published weights to a run of this project, and back.

    python -m tokenvit_jax.convert --model=deit_s --layout=timm --source=FILE --out=WORKDIR
    python -m tokenvit_jax.convert --layout=timm --source=WORKDIR --out=FILE.safetensors

    python -m tokenvit_jax.convert --model=vit_l --layout=segmenter --dataset=ade20k \\
        --source=checkpoint.pth --out=WORKDIR

FILE holds the arrays of a PyTorch model, as safetensors or as torch.save wrote them; the latter
needs PyTorch, which reads them without running code (weights_only). The settings of the model are
read off the arrays, but for --normalization, of which no file tells: imagenet, as DeiT's weights
want it and the default, or inception (mean and deviation 0.5), as those of timm's vit_*_augreg and
of Segmenter on a vit, where it is the default; and for the windows of Swin v2, which are those of
the registered model. WORKDIR is then like that of a training run, at step 0: predict, evaluate and
train take it.
Back: --checkpoint=last, best (highest accuracy or mIoU) or a step.

--layout=segmenter is that of github.com/rstrudel/segmenter: a vit or a deit with either decoder.
The position embeddings are those of the crops of its training; images and windows of the run
(`image_size`, `inference.window`) have their size. The file does not tell the stride of the windows
nor the sizes of images to evaluate (`data.eval_short_side`, `eval_size`, `label_size`): they are
those of evaluate's --config. The classifiers of its encoder, encoder.head and encoder.head_dist, on
which no mask depends, are passed over, and not written on the way back: such a file needs
load_state_dict(..., strict=False) there.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tokenvit_jax import cli
from tokenvit_jax.config import default_config
from tokenvit_jax.data import NORMALIZATIONS, dataset_info, list_datasets
from tokenvit_jax.errors import UserError
from tokenvit_jax.models import create_model
from tokenvit_jax.models.layouts import LAYOUTS, Layout, export_weights, import_weights
from tokenvit_jax.tasks import task_name, task_of
from tokenvit_jax.training.checkpoint import load_variables
from tokenvit_jax.training.new_run import check_new, write_run
from tokenvit_jax.training.workdir import read_config

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "model", None, "name of the model; not needed on the way back", flag_values=FLAGS
)
flags.DEFINE_enum(
    "layout", "timm", list(LAYOUTS), "names and shapes in the file", flag_values=FLAGS
)
flags.DEFINE_string("source", None, "file of weights, or on the way back a run", flag_values=FLAGS)
flags.DEFINE_string(
    "out", None, "folder of the new run, or on the way back a file", flag_values=FLAGS
)
flags.DEFINE_string("dataset", "imagenet2012", "whose classes the model tells", flag_values=FLAGS)
flags.DEFINE_enum(
    "normalization",
    None,
    list(NORMALIZATIONS),
    "of the pixels that the weights were trained with; default: that of most published ones",
    flag_values=FLAGS,
)
flags.DEFINE_string("checkpoint", "last", "last, best or a step", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Writes the run or the file."""
    source, out = Path(flag_values.source), Path(flag_values.out)
    if source.is_dir():
        export_run(source, out, flag_values.layout, flag_values.checkpoint)
    elif flag_values.model is None:
        raise UserError("--model is missing: the file does not say of which model it is")
    else:
        import_file(
            source,
            out,
            flag_values.model,
            flag_values.layout,
            flag_values.dataset,
            flag_values.normalization,
        )
    print(f"{source} -> {out}")


def import_file(
    source: Path, out: Path, name: str, layout: str, dataset: str, normalization: str | None
) -> None:
    """Writes a run at step 0 with the weights of a file.

    Args:
      source: safetensors, or a file of torch.save.
      out: folder of the run, new.
      name: of the model.
      layout: one of LAYOUTS.
      dataset: its classes must be as many as the model's.
      normalization: of the pixels, a key of NORMALIZATIONS; None: that of most weights in the
        layout. Goes into the run's config.

    Raises:
      UserError: the file cannot be read or does not fit, the layout has no such model or goes with
        other datasets, or the folder holds a run already.
    """
    found = _layout(layout, name, dataset)
    check_new(out)
    arrays = read_arrays(source)
    config = default_config()
    config.model, config.dataset = name, dataset
    config.data.normalization = normalization or found.normalization
    config.model_overrides = found.settings(arrays)
    config.update(found.head(arrays))
    model = task_of(dataset).make_model(config, dataset_info(dataset).num_classes)
    config.image_size = found.image_size(model)
    try:
        params = import_weights(arrays, _shapes(model), found.rules(model), found.unused)
    except UserError as error:
        raise UserError(f"--source={source}: {error}") from error
    write_run(out, config, {"params": params})


def export_run(source: Path, out: Path, layout: str, checkpoint: str) -> None:
    """Writes the weights of a run as safetensors.

    Args:
      source: folder of the run.
      out: file.
      layout: one of LAYOUTS.
      checkpoint: "last", "best" or a step.

    Raises:
      UserError: there is no such checkpoint, or the layout has no such model or goes with other
        datasets.
    """
    config = read_config(source)
    rules = _layout(layout, config.model, config.dataset).rules
    model = task_of(config.dataset).make_model(config, dataset_info(config.dataset).num_classes)
    loaded = load_variables(model, config.image_size, source, checkpoint)
    save_file(export_weights(loaded.variables["params"], rules(model)), out)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a file of weights.

    Args:
      path: safetensors, or what torch.save wrote: arrays by name, maybe inside "model" or
        "state_dict".

    Raises:
      UserError: the file is not there, damaged, or a pickle that would have to run code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise UserError(f"--source={path}: {error.strerror}") from error
    if start == b"PK" or start[:1] == b"\x80":  # a ZIP archive of torch.save, or an older pickle
        return _read_torch(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"--source={path} is neither safetensors nor of torch.save: {error}"
        ) from error


def _read_torch(path):
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(
            f"--source={path} was written by torch.save: reading it needs PyTorch (pip install "
            "torch), or a copy written by safetensors.torch.save_file"
        ) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zipfile's and torch's own types
        raise UserError(
            f"--source={path} is refused: it holds more than arrays, and reading it could run "
            "code. Where you trust it: safetensors.torch.save_file(torch.load(FILE, "
            "weights_only=False)['model'], 'FILE.safetensors')"
        ) from error
    for key in ("model", "state_dict"):
        found = found.get(key, found)
    return {name: tensor.float().numpy() for name, tensor in found.items()}


def _layout(layout: str, name: str, dataset: str) -> Layout:
    families = LAYOUTS[layout]
    create_model(name)  # an unknown name says so
    family = name.split("_")[0]
    if family not in families:
        raise UserError(f"--layout={layout} has no model {name!r}; valid: {', '.join(families)}")
    found = families[family]
    if (task := task_name(dataset_info(dataset))) != found.task:
        valid = ", ".join(x for x in list_datasets() if task_name(dataset_info(x)) == found.task)
        raise UserError(
            f"--layout={layout} is for {found.task}, dataset {dataset!r} for {task}; valid: {valid}"
        )
    return found


def _shapes(model):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    init = lambda x: model.init(jax.random.key(0), x, train=False)  # noqa: E731
    return jax.eval_shape(init, images)["params"]


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("source", "out"))
