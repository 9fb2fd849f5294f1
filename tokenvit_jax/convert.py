"""Converts published weights to a run of this project, and back.

    python -m tokenvit_jax.convert --model=deit_s --layout=timm --source=FILE --out=WORKDIR
    python -m tokenvit_jax.convert --layout=timm --source=WORKDIR --out=FILE.safetensors

    python -m tokenvit_jax.convert --model=vit_l --layout=segmenter --dataset=ade20k \\
        --source=checkpoint.pth --out=WORKDIR

FILE holds the arrays of a PyTorch model, written by safetensors or by torch.save. A file of
torch.save needs PyTorch, which reads it without running code (weights_only). WORKDIR becomes a run
at step 0: predict, evaluate and train read it like any other run.

The arrays determine the settings of the model, with two exceptions:

- The normalisation of the images (--normalization), which no file states: imagenet (ImageNet's mean
  and deviation, which DeiT's weights need) or inception (0.5 and 0.5, which timm's vit_*_augreg
  need). Default: inception for Segmenter on a vit, else imagenet.
- The windows of Swin v2, which have the size of the registered model.

When converting back, --checkpoint is last, best (highest accuracy or mIoU) or a step.

--layout=own keeps the names of this project, for every model. Such a file also holds the run's
configuration, so no other flag is needed to turn it into a run again:

    python -m tokenvit_jax.convert --layout=own --source=WORKDIR --out=FILE.safetensors
    python -m tokenvit_jax.convert --layout=own --source=FILE.safetensors --out=NEW_WORKDIR

--layout=segmenter is the layout of github.com/rstrudel/segmenter: a vit or a deit with either
decoder. The position embeddings fit the crops of the training, and the images and windows of the
run (`image_size`, `inference.window`) get the size of these crops. The file holds neither the
stride of the windows nor the sizes of the evaluation images (`data.eval_short_side`, `eval_size`,
`label_size`): give evaluate a --config with these entries. The encoder's classifiers, encoder.head
and encoder.head_dist, are dropped, because no mask depends on them. An exported file lacks them, so
the authors' code must load it with load_state_dict(..., strict=False).
"""

from pathlib import Path

from absl import flags

from tokenvit_jax import cli
from tokenvit_jax.data import NORMALIZATIONS
from tokenvit_jax.errors import UserError
from tokenvit_jax.training.conversion import export_run, import_file
from tokenvit_jax.training.own_weights import OWN, convert_own
from tokenvit_jax.weights import LAYOUTS

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "model", None, "name of the model; not needed when converting back", flag_values=FLAGS
)
flags.DEFINE_enum(
    "layout",
    "timm",
    [*LAYOUTS, OWN],
    "names and shapes of the arrays in the file",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "source", None, "file of weights; when converting back, workdir of a run", flag_values=FLAGS
)
flags.DEFINE_string(
    "out", None, "workdir of the new run; when converting back, a file", flag_values=FLAGS
)
flags.DEFINE_string(
    "dataset", "imagenet2012", "dataset whose classes the model predicts", flag_values=FLAGS
)
flags.DEFINE_enum(
    "normalization",
    None,
    list(NORMALIZATIONS),
    "pixel normalisation that the weights were trained with; default: the layout's most common one",
    flag_values=FLAGS,
)
flags.DEFINE_string("checkpoint", "last", "last, best or a step", flag_values=FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Writes the run or the file."""
    source, out = Path(flag_values.source), Path(flag_values.out)
    if flag_values.layout == OWN:
        convert_own(source, out, flag_values.checkpoint)
    elif source.is_dir():
        export_run(source, out, flag_values.layout, flag_values.checkpoint)
    elif flag_values.model is None:
        raise UserError("--model is missing: the file does not name its model")
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


if __name__ == "__main__":
    cli.run(main, FLAGS, required=("source", "out"))
