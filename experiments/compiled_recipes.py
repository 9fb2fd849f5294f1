"""Compiles the training step of every shipped recipe for one H100, eight H100 and 256 TPU v5e.

    python -m experiments.compiled_recipes                  # all rows that are missing: hours
    python -m experiments.compiled_recipes dgt_t deit_s     # these recipes
    python -m experiments.compiled_recipes dgt_t h100x8     # on these targets
    python -m experiments.compiled_recipes page             # no row: writes the page

No device is needed, but the compilers are (see docs/compiling.md). Each row is compiled in a
process of its own and stored at once in `docs/benchmarks/compiled.jsonl`. Rows that are there are
not compiled again; delete a line to compile it anew.
"""

import datetime
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax

from experiments import pages
from tokenvit_jax import cli
from tokenvit_jax.ahead.compiling import smallest_batch
from tokenvit_jax.ahead.targets import parse_target
from tokenvit_jax.config_flag import config_files
from tokenvit_jax.measure.report import markdown_table
from tokenvit_jax.recipes.compiled import BOUNDS

PAGE = pages.ROOT / "docs" / "benchmarks" / "compiled.md"
ROWS = PAGE.with_suffix(".jsonl")
TARGETS = ("h100", "h100x8", "v5e:16x16")
MOST = 128  # images per device
LONG_VECTORS = "2026-11-28"  # from this day on, GPUs add gradients in long vectors
# Recipes that are no file of their own; a file whose configuration needs an argument.
VARIANTS = {
    "deit_s": ("", "level3"),
    "dpt": ("kitti", "nyu"),
    "finetune": ("vit_b",),
    "htc": ("swinv2_l",),
    "mask2former": ("ade20k_semantic_swin_t", "coco_panoptic_swin_l"),
    "mask_rcnn": ("clustr_s", "dgt_t", "pale_t", "swin_t"),
    "pose": ("clustr_s",),
    "retinanet": ("clustr_s", "swin_t"),
    "semantic_fpn": ("clustr_s",),
    "upernet": ("clustr_s", "dgt_t", "pale_t", "swin_t"),
}

Row = dict[str, Any]


def recipes() -> list[str]:
    """Returns the values of --config for all recipes that train at scale."""
    return [
        f"{name}:{argument}" if argument else name
        for name in sorted(config_files())
        for argument in VARIANTS.get(name, ("",))
    ]


def read_rows() -> list[Row]:
    """Returns the rows that were compiled."""
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text().splitlines() if line]


def batches(recipe: str, target: str) -> list[int]:
    """Returns numbers of images per device to try, falling.

    The first is that of the recipe on these devices, at most MOST, and each is about half of the
    one before.
    """
    flag_values = cli.config_flags()
    flag_values(["compile", f"--config={recipe}"])
    config, found = cli.read_config(flag_values), parse_target(target)
    step = smallest_batch(config, "train", found)
    per_device = min(MOST, config.batch_size // found.num_devices)
    number = max(1, per_device // step)
    return [(number >> i) * step for i in range(number.bit_length())]


def compile_row(recipe: str, target: str) -> Row:
    """Compiles a training step for the largest of several batches that fits, or the smallest."""
    waiting = batches(recipe, target)
    while True:
        row = run(recipe, target, waiting[0])
        if row.get("fits") or "error" in row or len(waiting) == 1:
            return row
        fitting = row["estimated_largest_batch_per_device"]
        waiting = [batch for batch in waiting[1:] if batch <= fitting] or waiting[-1:]


def run(recipe: str, target: str, batch: int) -> Row:
    """Runs the command; returns its report, or the error."""
    arguments = [f"--config={recipe}", f"--target={target}", f"--batch_per_device={batch}"]
    command = [sys.executable, "-m", "tokenvit_jax.compile", *arguments, "--format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=pages.ROOT)
    keys = {
        "recipe": recipe,
        "target": target,
        "date": str(datetime.date.today()),
        "jax": jax.__version__,
    }
    if not done.stdout:
        return keys | {"error": done.stderr.strip().splitlines()[-1]}
    return keys | json.loads(done.stdout)


def main() -> None:
    """Compiles what is missing and writes the page after every row."""
    asked = sys.argv[1:]
    unknown = set(asked) - {*TARGETS, *recipes(), "page"}
    if unknown:
        sys.exit(f"error: {', '.join(unknown)}; valid: {', '.join([*TARGETS, *recipes(), 'page'])}")
    targets = [name for name in TARGETS if name in asked] or TARGETS
    names = [name for name in recipes() if name in asked] or recipes()
    for recipe in names if "page" not in asked else ():
        for target in targets:
            if any((row["recipe"], row["target"]) == (recipe, target) for row in read_rows()):
                continue
            print(f"{recipe} for {target} ...", flush=True)
            row = compile_row(recipe, target)
            if "error" in row:
                print(row["error"], flush=True)
                continue
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            PAGE.write_text("\n".join(page(read_rows())) + "\n")
    PAGE.write_text("\n".join(page(read_rows())) + "\n")


# ------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------


def page(rows: list[Row]) -> list[str]:
    """Returns the lines of the page."""
    versions = sorted({row["jax"] for row in rows})
    dates = sorted({row["date"] for row in rows})
    lines = pages.heading(
        "Training steps of the recipes, compiled",
        __file__,
        f"""
        Nothing ran: the steps were compiled for devices that were not there
        ({" to ".join(dates[:1] + dates[1:][-1:])}, jax {", ".join(versions)}), as the command
        `compile` does ([compiling](../compiling.md)). Each device sees as many images as in the
        recipe, at most {MOST}, or fewer where these do not fit into its memory. "Floor" is the
        least time of the kernels; "images/s" is for all devices. Its range for GPUs comes from
        training steps on one H200: floors were .58 to .67 of the measured times of kernels. On
        TPUs nothing was measured, so that the number is only an upper bound. Collectives are
        counted in full, as if nothing ran beside them; "efficiency" is the share of the step that
        they leave, on paper
        ([formula](../scale_out.md#efficiency-on-paper)). Launches of TPUs are operations of the
        program. "Compiled" is the time of all processors together; "(O1)" marks programs with fewer
        optimisations, whose floors are up to several times as long. "Misfits" are kernels that
        cannot take their arguments, in whose place the default form runs.
        """,
    )
    for target in TARGETS:
        found = [row for row in rows if row["target"] == target]
        if found:
            lines += ["", f"## {found[0]['devices']} x {found[0]['device']}", "", *_table(found)]
            lines += [*_floors(found), *_outdated(found)]
    return [*lines, *_bounds()]


def _floors(rows: list[Row]) -> list[str]:
    """Returns a paragraph that says which floors are without the instructions of kernels."""
    if ":" in rows[0]["target"]:  # TPUs
        return []
    names = sorted(f"`{row['recipe']}`" for row in rows if "limits" not in row)
    if not names:
        return []
    text = f"""Compiled before floors had the instructions of kernels, so that images/s follow from
        .37 to .57 instead: {", ".join(names)}."""
    return ["", *pages.paragraph(text)]


def _outdated(rows: list[Row]) -> list[str]:
    """Returns a paragraph that names the rows of an earlier form of the sums over GPUs."""
    several = [row for row in rows if row["devices"] > 1 and ":" not in row["target"]]
    names = [f"`{row['recipe']}`" for row in several if row["date"] < LONG_VECTORS]
    if not names:
        return []
    text = f"""Compiled before gradients travelled in long vectors, which saves about 30 % of
        the launches: {", ".join(sorted(names))}."""
    return ["", *pages.paragraph(text)]


def _table(rows: list[Row]) -> list[str]:
    columns = [
        "recipe", "images per device", "memory, GiB", "launches", "floor, ms", "images/s",
        "efficiency, %", "all-reduces", "of these BatchNorm", "MB", "misfits", "compiled, s",
    ]  # fmt: skip
    order = {name: place for place, name in enumerate(recipes())}
    rows = sorted(rows, key=lambda row: order.get(row["recipe"], len(order)))
    return markdown_table(columns, map(_cells, rows))


def _cells(row: Row) -> Iterator[str]:
    reduces = [one for one in row.get("collectives", ()) if one["kind"] == "all-reduce"]
    norms = [one for one in reduces if one["name"].startswith("BatchNorm")]
    yield f"`{row['recipe']}`"
    yield f"{row['batch_per_device']}"
    yield f"{row['memory']['total'] / 2**30:.1f}"
    if not row["fits"]:
        yield "does not fit"
        yield from [""] * 6
    else:
        yield f"{row['launches']:,}"
        yield f"{1e3 * row['floor_seconds']:.1f}"
        yield _images(row["images_per_second"])
        yield _efficiency(row)
        yield f"{sum(one['count'] for one in reduces)}"
        yield f"{sum(one['count'] for one in norms)}"
        yield f"{sum(one['bytes'] for one in reduces) / 1e6:.1f}"
    yield f"{len(row['misfits'])}"
    yield f"{row['processor_seconds']:.0f}{' (O1)' if row.get('level') == 'O1' else ''}"


def _images(speed: dict[str, float]) -> str:
    if speed["low"] is None:
        return f"below {speed['bound']:,.0f}"
    return f"{speed['low']:,.0f} to {speed['high']:,.0f}"


def _efficiency(row: Row) -> str:
    """Returns the share of a step in which a device computes, k / (k + c) [%]."""
    speed = row["images_per_second"]
    rates = (speed["bound"],) if speed["low"] is None else (speed["high"], speed["low"])
    shares = [1 - row["collective_seconds"] * rate / row["batch_size"] for rate in rates]
    return " to ".join(dict.fromkeys(f"{100 * share:.0f}" for share in shares))


def _bounds() -> Iterator[str]:
    """Yields the lines about the bounds that tests compare with."""
    yield from ["", "## Bounds", ""]
    yield from pages.paragraph(
        """`make test-aot` compiles these steps and fails above the bounds in
        `tokenvit_jax/recipes/compiled.py`. Without a number, a step only has to fit into the
        memory of the device."""
    )
    yield ""
    rows = [
        (f"`{recipe}`", target, bound.images, bound.memory_gib or "", bound.launches or "")
        for recipe, bounds in BOUNDS.items()
        for target, bound in bounds.items()
    ]
    yield from markdown_table(["recipe", "target", "images", "memory, GiB", "launches"], rows)


if __name__ == "__main__":
    main()
