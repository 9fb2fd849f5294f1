"""Prints the time and memory of models and operators on this machine.

    python -m tokenvit_jax.benchmark --model=dgt_t --image_size=224 --batch_size=8 --mode=train
    python -m tokenvit_jax.benchmark --model=dgt_t,pale_t --against=pvt_v2_b2 --mode=both
    python -m tokenvit_jax.benchmark --model=deit_s --keep=level1 --keep=level3
    python -m tokenvit_jax.benchmark --task=segmentation --against=upernet_swin_t --mode=both
    python -m tokenvit_jax.benchmark --task=depth --image_size=384x512 --expedite=3,9,14x14
    python -m tokenvit_jax.benchmark --op=group_attention --out=curve.png
    python -m tokenvit_jax.benchmark --report

A training step is forward, backward and plain gradient descent in one compiled call that reuses the
memory of its parameters. Several models take turns in one run, including timm models (--against).
Models differ in size, so they are compared by images per second times the multiply-adds (MACs) of
the forward pass of one image: their speed at equal MACs. With --keep or --expedite, every model
takes turns with a variant that has a token reducer or clustered tokens: "speedup" is the gain in
images per second, "saved" the gain in MACs. An operator takes turns with its obvious alternatives,
and RoIAlign, nms, select_detections and match_boxes with torchvision's, where they load. Times are
medians; compilation and warm-up are separate. JAX, Flax and NumPy suffice; --against needs PyTorch
and timm.

--task=segmentation times UperNet, with Swin-T unless --model names another backbone that has a
recipe; --task=depth times DPT-hybrid; --task=detection times Mask R-CNN, with Swin-T unless --model
names another; --task=masks times Mask2Former for semantic segmentation of ADE20K, and --task=pose
the head of transposed convolutions for whole-body poses, likewise. The training step has the loss
of the recipe, on a batch that is prepared before. --against then names networks of transformers,
upernet_swin_t, dpt_hybrid, mask2former_swin_t or pose_swin_t, whose head is made of PyTorch's
layers, or mask_rcnn_swin_t, which is made of torchvision's modules and timm's Swin-T.

--report measures all of this in about a quarter of an hour and writes a page for this machine: the
smallest model of each family beside timm's, where their time goes, attention by the number of
tokens beside the dense forms, clustering, token reducers. The page is written after every table,
and names what did not fit into --report_minutes. Without PyTorch and timm it has no comparison.
With --task, the page is about dense tasks.

Temporary memory is the memory that XLA plans; allocations of the libraries that XLA calls are not
included. On CPU, glibc keeps freed pages, as in training (see `tokenvit_jax.memory`).
"""

import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from absl import flags

from tokenvit_jax import cli, slurm
from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.expediting import insertions
from tokenvit_jax.valid import whole

# A test compares them with `measure.operators`, whose import is too slow for --help.
OPERATORS = (
    "group_attention", "depthwise_conv", "dot_product_attention", "cluster_density_peaks",
    "kmedoids", "kmeans", "cluster_superpixels", "reconstruct_tokens", "roi_align",
    "nms", "select_detections", "match_boxes", "assign_targets", "sample_objects",
)  # fmt: skip


class Measured(NamedTuple):
    """What is measured of a task by default.

    Attributes:
      model: name of the backbone.
      image_size: as --image_size.
      title: of the network.
      peer: network of a package in PyTorch beside it.
      insertions: label -> overrides of the model, for --report.
      inserted_size: height and width of the images then [pixels].
      batch_size: images per batch.
      package: of the peers.
    """

    model: str
    image_size: str
    title: str = ""
    peer: str = ""
    insertions: Mapping[str, Any] = MappingProxyType({})
    inserted_size: tuple[int, int] | None = None
    batch_size: int = 2
    package: str = "transformers"


# The settings that the authors of Expedite released for NYU: blocks before the clustering, centres.
_CLUSTERED = {
    f"{alpha}, {side} x {side}": {
        "expedite": {"alpha": alpha, "beta": 12 - alpha, "clusters": (side, side),
                     "temperature": 1.0, "mode": "hard"}
    }
    for alpha, side in ((3, 14), (5, 16), (7, 24))
}  # fmt: skip
# A test compares them with `tasks.TASKS`.
MEASURED = {
    "segmentation": Measured("swin_t", "512", "UperNet, Swin-T", "upernet_swin_t"),
    "depth": Measured(
        "vit_b_r50", "384", "DPT-hybrid", "dpt_hybrid", _CLUSTERED, inserted_size=(384, 512)
    ),
    "detection": Measured(
        "swin_t", "800x1344", "Mask R-CNN, Swin-T", "mask_rcnn_swin_t", batch_size=1,
        package="torchvision",
    ),
    "masks": Measured(
        "swin_t", "640", "Mask2Former, Swin-T", "mask2former_swin_t", batch_size=1
    ),
    "pose": Measured(
        "swin_t", "256x192", "Whole-body poses, Swin-T with transposed convolutions", "pose_swin_t",
        batch_size=8,
    ),
}  # fmt: skip

FLAGS = flags.FlagValues()
flags.DEFINE_list("model", None, "names, separated by commas, or all", flag_values=FLAGS)
flags.DEFINE_multi_enum(
    "task",
    [],
    list(MEASURED),
    "models of a dense task instead of classification; --model is then a backbone; with --report, "
    "the flag can be repeated",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "against",
    [],
    "names of timm models, or with --task of networks of transformers, separated by commas, that "
    "take turns with --model",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "image_size",
    None,
    "side or HEIGHTxWIDTH [pixels]; default: 224, or the task's own",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "op",
    None,
    OPERATORS,
    "a single operator, at the shapes of the models, instead of a model",
    flag_values=FLAGS,
)
cli.define_number(
    FLAGS, "batch_size", None, "images per batch; default: 8, or that of the task or operator",
    whole(1, 2**16),
)  # fmt: skip
flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "dtype of the computation; default of --report: bfloat16 on an accelerator",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "mode",
    None,
    ["forward", "train", "both"],
    "train: with the backward pass; default: forward, or both with --op",
    flag_values=FLAGS,
)
flags.DEFINE_enum("format", "table", ["table", "json"], "output format", flag_values=FLAGS)
flags.DEFINE_string(
    "out", None, "with --op=group_attention: picture of the cost over L", flag_values=FLAGS
)
cli.define_path_with_default(
    FLAGS, "report", "write a page for this machine: --report=FILE, or --report for DEVICE.md in "
    "docs/benchmarks, or here if there is no such folder",
)  # fmt: skip
cli.define_number(FLAGS, "report_minutes", 15, "with --report: time to spend", whole(1, 1440))
insertions.define_flags(FLAGS)


def main(flag_values: flags.FlagValues) -> None:
    """Prints the measurements."""
    slurm.check_one_task("benchmark")  # they would also wait for each other's work
    _check_flags(flag_values)
    if flag_values.report:
        _write_report(flag_values)
        return
    out = cli.picture_path(flag_values, "out")
    from tokenvit_jax.measure import report, timing, torch_peers
    from tokenvit_jax.memory import keep_pages

    if flag_values.against:
        torch_peers.share_memory()
    keep_pages()
    rows = _measure(flag_values)
    environment = timing.environment()
    if flag_values.against:
        package = MEASURED[flag_values.task[0]].package if flag_values.task else "timm"
        environment |= torch_peers.environment(package)
    if out:
        from tokenvit_jax.output import write_figure

        write_figure(out, report.plot_cost(rows), "--out")
    print(report.format_results(rows, environment, flag_values.format))


def _measure(flag_values):
    import jax.numpy as jnp

    from tokenvit_jax.measure import macs, models, operators
    from tokenvit_jax.models import list_models

    dtype = jnp.dtype(flag_values.dtype)
    mode = flag_values.mode or ("both" if flag_values.op else "forward")
    modes = ["forward", "train"] if mode == "both" else [mode]
    if flag_values.op:
        return operators.benchmark_operator(flag_values.op, flag_values.batch_size, dtype, modes)
    kind, default = models.CLASSIFICATION, Measured("", "224")
    if flag_values.task:
        [task] = flag_values.task
        kind, default = _task_kind(task), MEASURED[task]
    names = flag_values.model or [default.model]
    if names == ["all"] and not flag_values.task:
        names = list_models()
    image_size = macs.parse_image_size(flag_values.image_size or default.image_size)
    return models.benchmark_models(
        names,
        image_size,
        flag_values.batch_size or (default.batch_size if flag_values.task else 8),
        dtype,
        modes,
        against=flag_values.against,
        insertions={
            name: insertions.from_flags(
                flag_values, name, macs.fits(functools.partial(kind.model, name), image_size)
            )
            for name in names
        },
        kind=kind,
    )


def _task_kind(task):
    """Returns how the models of a task are timed."""
    from tokenvit_jax.recipes import detection, dpt, mask2former, pose, upernet
    from tokenvit_jax.training.task_speed import task_kind

    def detector(name):
        config = detection.mask_rcnn_config(name)
        config.head_overrides.update({"loss_group": 1})  # batches of any size
        return config

    def deconvolution(name):
        config = pose.whole_body_config(name)
        config.head = "deconvolution"
        return config

    recipes = {
        "segmentation": {
            name: functools.partial(upernet.upernet_config, name) for name in upernet.MODELS
        },
        "depth": {dpt.MODEL: functools.partial(dpt.dpt_config, "nyu")},
        "detection": {name: functools.partial(detector, name) for name in detection.MASK_RCNN},
        "masks": {
            name: functools.partial(mask2former.mask2former_config, f"ade20k_semantic_{name}")
            for name in mask2former.MODELS
        },
        "pose": {name: functools.partial(deconvolution, name) for name in pose.MODELS},
    }[task]

    def recipe(name):
        if name not in recipes:
            hint, valid = did_you_mean(name, recipes), ", ".join(recipes)
            raise UserError(f"--model={name} is not valid with --task={task}{hint}; valid: {valid}")
        return recipes[name]()

    return task_kind(recipe, MEASURED[task].package)


def _write_report(flag_values):
    """Writes the page of --report, again after each of its tables."""
    from tokenvit_jax.measure import macs, page, torch_peers
    from tokenvit_jax.memory import keep_pages
    from tokenvit_jax.output import check_file, write_file
    from tokenvit_jax.progress import note

    torch_peers.share_memory()
    keep_pages()
    path = _report_path(flag_values.report)
    check_file(path, "--report")
    if flag_values.task:
        plan = _task_plan(flag_values)
    else:
        plan = _plan(flag_values, macs.parse_image_size(flag_values.image_size or "224"))
    command = " ".join(["tokenvit benchmark", *sys.argv[1:]])
    for text in page.measure_page(plan, flag_values.report_minutes, command):
        write_file(path, text, "--report")
        measured = text.count(page.HEADING) - text.count(f"{page.HEADING}{page.NOT_MEASURED}")
        note(f"{path}: {measured} parts")


def _report_path(value):
    import jax

    if value != cli.DEFAULT_PATH:
        return Path(value)
    folder = Path("docs/benchmarks")
    name = re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower()).strip("_")
    return (folder if folder.is_dir() else Path()) / f"{name}.md"


def _plan(flag_values, image_size):
    """Returns what --report measures: the flags, or what suits the device."""
    import jax

    from tokenvit_jax.measure import page

    on_cpu = jax.default_backend() == "cpu"
    keep = {
        f"{method} level3": {"token_reducer": {"keep": insertions.parse_keep("level3", "deit_s"),
                                               "method": method}}
        for method in ("weighted_kmedoids", "tome")
    }  # fmt: skip
    plan = page.Plan(
        image_size=image_size,
        batch_size=flag_values.batch_size or (8 if on_cpu else 128),
        dtype=_dtype_of_report(flag_values),
        insertions={"deit_s": keep},
        lengths=page.LENGTHS_ON_CPU if on_cpu else page.LENGTHS,
    )
    if not flag_values.model:
        return plan
    reduced = {name: plan.insertions[name] for name in flag_values.model if name in plan.insertions}
    return plan._replace(small=flag_values.model, large=(), insertions=reduced)


def _task_plan(flag_values):
    """Returns what --report --task measures."""
    from tokenvit_jax.measure import macs, page

    tasks = [
        page.TaskPlan(
            measured.title, _task_kind(name), measured.model, measured.peer,
            macs.parse_image_size(measured.image_size),
            flag_values.batch_size or measured.batch_size,
            measured.insertions, measured.inserted_size,
        )
        for name, measured in MEASURED.items() if name in flag_values.task
    ]  # fmt: skip
    first, dtype = tasks[0], _dtype_of_report(flag_values)
    return page.Plan(first.image_size, first.batch_size, dtype, tasks=tasks)


def _dtype_of_report(flag_values):
    """Returns the type of --dtype, or the one that the device is for."""
    import jax
    import jax.numpy as jnp

    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(flag_values.dtype if flag_values["dtype"].present else default)


def _check_flags(flag_values):
    if flag_values.report:
        allowed = ["report", "report_minutes", "batch_size", "dtype"]
        allowed += ["task"] if flag_values.task else ["model", "image_size"]
        for name in flag_values:
            if flag_values[name].present and name not in allowed:
                raise cli.UsageError(f"--{name} does not go with --report")
        return
    if flag_values["report_minutes"].present:
        raise cli.UsageError("--report_minutes goes with --report")
    if len(flag_values.task) > 1:
        raise cli.UsageError("--task can be repeated with --report only")
    if bool(flag_values.model or flag_values.task) == bool(flag_values.op):
        raise cli.UsageError("one of --model=NAME, --task=NAME, --op=NAME and --report is needed")
    if flag_values.op and flag_values.image_size:
        raise cli.UsageError("--image_size goes with --model; operators have their own shapes")
    if flag_values.op and flag_values.against:
        raise cli.UsageError("--against goes with --model; operators have their own alternatives")
    for name in ("keep", "method", "carry", "expedite"):
        if flag_values.op and flag_values[name].present:
            raise cli.UsageError(f"--{name} goes with --model; nothing is inserted into operators")
    if flag_values.out and flag_values.op != "group_attention":
        raise cli.UsageError("--out goes with --op=group_attention")


if __name__ == "__main__":
    cli.run(main, FLAGS)
