"""Layout of DPT: its names and shapes, arrays without use, both directions, from the files on."""

import functools
import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tokenvit_jax.errors import UserError
from tokenvit_jax.heads import DptHead
from tokenvit_jax.models import create_model
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.tasks.depth.model import Dpt, default_blocks
from tokenvit_jax.training.conversion import Choices, export_run, import_file
from tokenvit_jax.training.run import load_run
from tokenvit_jax.weights import (
    LAYOUTS,
    export_variables,
    import_variables,
    recognise_layout,
    similar_models,
)

NAMES = json.loads(
    gzip.decompress((Path(__file__).parent / "golden" / "dpt_names.json.gz").read_bytes())
)
LAYOUT = LAYOUTS["dpt"]["vit"]
UNUSED = (
    "pretrained.model.head.", "pretrained.model.norm.", "scratch.refinenet4.resConfUnit1."
)  # fmt: skip
STEM = {"first": 32, "widths": (128, 128, 128), "depths": (1, 1, 1)}
SETTINGS = {"dim": 32, "depth": 4, "num_heads": 4, "stem": STEM, "position_size": (64, 64)}


def small(**head):
    backbone = create_model("vit_b_r50", **SETTINGS)
    return Dpt(backbone, DptHead(**head), default_blocks(4, 2))


@functools.cache
def small_arrays():
    """Returns random arrays of a small network, under the published names."""
    model = small(channels=12, level_channels=(128, 128, 24, 20), last_channels=6)
    shapes = variable_shapes(model, jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32))
    rng = np.random.default_rng(0)
    draw = lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    return export_variables(jax.tree.map(draw, shapes), model, LAYOUT)


def test_names_and_shapes_are_those_of_published_files():
    file = {name: np.broadcast_to(np.float32(0), shape) for name, shape in NAMES.items()}
    assert recognise_layout(file, "vit_b_r50") == "dpt"
    assert similar_models(file) == ["vit_b_r50"]
    overrides = LAYOUT.model_overrides(file)
    model = Dpt(create_model("vit_b_r50", **overrides), DptHead(), (8, 11))
    assert model.backbone == create_model("vit_b_r50", distilled=False)
    assert LAYOUT.config_entries(file)["head_overrides"] == {
        "channels": 256, "last_channels": 32, "level_channels": (256, 512, 768, 768)
    }  # fmt: skip
    shapes = variable_shapes(model, jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32))
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    written = export_variables(zeros, model, LAYOUT)
    assert {name: list(x.shape) for name, x in written.items()} == NAMES
    assert sum(x.size for x in written.values()) == 123_146_985


def test_arrays_without_use_are_accepted_and_others_are_not():
    arrays = small_arrays()
    model = small(channels=12, level_channels=(128, 128, 24, 20), last_channels=6)
    used = {name: x for name, x in arrays.items() if not name.startswith(UNUSED)}
    assert len(arrays) - len(used) == 8
    assert LAYOUT.complete(used).keys() == arrays.keys()
    jax.tree.map(
        np.testing.assert_array_equal,
        import_variables(arrays, model, LAYOUT),
        import_variables(used, model, LAYOUT),
    )
    with pytest.raises(UserError, match=r"scratch\.other \(1,\) has no counterpart in the model"):
        import_variables(arrays | {"scratch.other": np.zeros(1)}, model, LAYOUT)
    del used["scratch.refinenet4.resConfUnit2.conv1.bias"]
    with pytest.raises(UserError, match=r"refinenet4\.resConfUnit2\.conv1\.bias is missing"):
        import_variables(used, model, LAYOUT)


def test_plain_hosts_have_transposed_convolutions():
    """(in, out, rows, columns), as in PyTorch."""
    model = Dpt(
        create_model("deit_ti", dim=16, depth=4, num_heads=2),
        DptHead(4, (3, 5, 6, 7)),
        default_blocks(4),
    )
    shapes = variable_shapes(model, jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32))
    arrays = export_variables(
        jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes), model, LAYOUT
    )
    names = [f"pretrained.act_postprocess{level}.4.weight" for level in (1, 2, 3, 4)]
    assert [arrays[name].shape if name in arrays else None for name in names] == [
        (3, 3, 4, 4), (5, 5, 2, 2), None, (7, 7, 3, 3)
    ]  # fmt: skip
    back = import_variables(arrays, model, LAYOUT)
    assert jax.tree.map(np.shape, back) == jax.tree.map(np.shape, shapes)


def test_files_become_runs_and_back(tmp_path):
    """Here a file of a training, which has the arrays below "model."."""
    source, workdir, back = (tmp_path / name for name in ("a.safetensors", "run", "b.safetensors"))
    arrays = small_arrays()
    save_file({f"model.{name}": x for name, x in arrays.items()}, source)
    choices = Choices(model_overrides={"num_heads": 4, "dim": 32, "depth": 4})
    lines = import_file(source, workdir, "vit_b_r50", choices=choices)
    assert lines[0] == "vit_b_r50, layout dpt, no classifier, image_size 64"
    run = load_run(workdir)
    assert run.config.task == "depth" and run.config.data.normalization == "inception"
    assert run.model.blocks == (2, 3) and run.model.head.level_channels == (128, 128, 24, 20)
    assert export_run(workdir, back, "auto", "last") == ["vit_b_r50, layout dpt"]
    jax.tree.map(np.testing.assert_array_equal, load_file(back), arrays)
