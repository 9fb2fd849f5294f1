"""Layouts of mmsegmentation: its names and shapes, its logits, both directions."""

import functools
import gzip
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from make_task import make_task
from safetensors.numpy import load_file, save_file
from sampled import sampled

from tokenvit_jax.errors import UserError
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training.conversion import Choices, export_run, import_file
from tokenvit_jax.training.run import load_run
from tokenvit_jax.weights import (
    LAYOUTS,
    export_variables,
    import_variables,
    layouts_of,
    recognise_layout,
    similar_models,
)

GOLDEN = Path(__file__).parent / "golden"
COMPUTED = ("relative_position_index", "num_batches_tracked", "attn_mask")
NAMES = json.loads(gzip.decompress((GOLDEN / "mmseg_names.json.gz").read_bytes()))


@functools.cache
def wide_model(head):
    """Returns a model as wide as Swin-T with one block per stage, and variables that are zero."""
    config = default_config("segmentation")
    config.dataset, config.model, config.head = "scenes", "swin_t", head
    config.model_overrides = {"depths": (1, 1, 1, 1)}
    model = make_task(config, 150).make_model()
    shapes = variable_shapes(model, jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32))
    return model, jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)


@pytest.mark.parametrize(
    ("names", "layout", "head", "settings"),
    sampled([
        ("upernet_swin_t.mmseg", "mmseg", "upernet", {"channels": 512, "auxiliary_channels": 256}),
        (
            "upernet_swin_t.original", "mmseg0", "upernet",
            {"channels": 512, "auxiliary_channels": 256},
        ),
        (
            "semantic_fpn_swin_t.mmseg", "mmseg", "semantic_fpn",
            {"channels": 128, "neck_channels": 256},
        ),
    ]),
)  # fmt: skip
def test_names_and_shapes_are_those_of_published_files(names, layout, head, settings):
    file = {name: np.broadcast_to(np.float32(0), shape) for name, shape in NAMES[names].items()}
    assert recognise_layout(file, "swin_t") == layout
    assert similar_models(file) == ["swin_t"]
    found = LAYOUTS[layout]["swin"]
    model, variables = wide_model(head)
    arrays = export_variables(variables, model, found)
    wanted = [name for name in file if not re.search(r"blocks\.[1-9]", name)]
    expected = {name: file[name].shape for name in wanted if not name.endswith(COMPUTED)}
    assert {name: x.shape for name, x in arrays.items()} == expected
    assert found.num_classes(file) == 150
    assert found.model_overrides(file) == {"window_size": 7}
    entries = found.config_entries(file)
    assert (entries["head"], entries["head_overrides"]) == (head, settings)
    assert "auxiliary_weight" not in entries
    scalars = {name: np.zeros((), np.float32) for name in file}
    assert found.num_classes(scalars) == 0
    assert found.config_entries(scalars)["head_overrides"] == {}


@pytest.mark.slow
def test_logits_equal_mmsegmentation_and_the_original_names(tmp_path):
    """The arrays have the names of 1.x; some also as Swin's own code stores them."""
    golden = np.load(GOLDEN / "upernet_swin_96x128.npz")
    golden = {name: x.astype(np.float32) for name, x in golden.items()}
    arrays = {k.removeprefix("w/"): x for k, x in golden.items() if k.startswith("w/")}
    counter = {"decode_head.bottleneck.bn.num_batches_tracked": np.array(3)}
    source, workdir, back = (tmp_path / name for name in ("a.safetensors", "run", "b.safetensors"))
    save_file(arrays | counter, source)
    settings = {"dims": (8, 16, 32, 64), "num_heads": (1, 2, 2, 4), "depths": (2, 2, 2, 2)}
    choices = Choices(dataset="scenes", model_overrides=settings)
    lines = import_file(source, workdir, "swin_t", choices=choices)
    assert lines[0] == "swin_t, layout mmseg, scenes, image_size 512"
    assert "normalization=imagenet" in lines[1]
    run = load_run(workdir)
    assert run.config.model_overrides.window_size == 2 and run.config.inference.window == "whole"
    assert run.config.head_overrides.to_dict() == {"channels": 6, "auxiliary_channels": 6}

    @jax.jit
    def logits(variables, images):
        return run.model.apply(variables, images, method="coarse_logits").main

    found = logits(run.variables, golden["image"].transpose(0, 2, 3, 1))
    expected = golden["logits"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected).mean() > 0.1

    assert export_run(workdir, back, "auto", "last") == ["swin_t, layout mmseg"]
    jax.tree.map(np.testing.assert_array_equal, load_file(back), arrays)
    older = export_variables(run.variables, run.model, LAYOUTS["mmseg0"]["swin"])
    original = {k.removeprefix("original/"): x for k, x in golden.items() if "original/" in k}
    assert len(original) == 9
    for name, array in original.items():
        np.testing.assert_array_equal(older[name], array)
    again = import_variables(older, run.model, LAYOUTS["mmseg0"]["swin"])
    jax.tree.map(np.testing.assert_array_equal, again, run.variables)


def test_file_without_an_auxiliary_head():
    names = [name for name in NAMES["upernet_swin_t.mmseg"] if not name.startswith("auxiliary")]
    entries = LAYOUTS["mmseg"]["swin"].config_entries(dict.fromkeys(names, np.zeros((4, 1, 1, 1))))
    assert entries["auxiliary_weight"] == 0 and entries["head_overrides"] == {"channels": 4}


def test_other_heads_and_models_have_no_such_layout():
    config = default_config("segmentation")
    config.dataset, config.model, config.head = "scenes", "swin_t", "linear"
    model = make_task(config).make_model()
    with pytest.raises(LookupError, match="the layout has no LinearDecoder"):
        export_variables({}, model, LAYOUTS["mmseg"]["swin"])
    assert layouts_of("swin_t", "segmentation") == ["mmseg", "mmseg0"]
    with pytest.raises(UserError, match=r"'swinv2_t' for segmentation; valid: vit, deit, swin$"):
        layouts_of("swinv2_t", "segmentation")
