"""Layouts of Mask2Former: names, outputs of the published code, settings, both directions."""

import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from sampled import sampled

from tokenvit_jax.errors import UserError
from tokenvit_jax.heads import Mask2Former
from tokenvit_jax.models.swin import Swin, SwinSettings
from tokenvit_jax.tasks import default_config
from tokenvit_jax.tasks.masks.model import MaskSegmenter
from tokenvit_jax.tasks.masks.settings import check_sizes, eval_canvas
from tokenvit_jax.weights import export_variables, import_variables
from tokenvit_jax.weights.mask2former import DETECTRON2, HUB

GOLDEN = Path(__file__).parent / "golden"
ARRAYS = dict(np.load(GOLDEN / "mask2former_swin_96x160.npz"))
WEIGHTS = {k.removeprefix("w/"): x for k, x in ARRAYS.items() if k.startswith("w/")}
NAMES = json.loads(gzip.decompress((GOLDEN / "mask2former_names.json.gz").read_bytes()))
MODEL = MaskSegmenter(
    Swin(SwinSettings(
        dims=(8, 16, 32, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=2,
        num_classes=0,
    )),
    Mask2Former(
        num_classes=4, num_queries=6, channels=32, num_heads=4, encoder_depth=1,
        encoder_hidden=32, depth=3, hidden=32,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def variables():
    return import_variables(WEIGHTS, MODEL, DETECTRON2)


def test_predictions_equal_mask2formers(variables):
    """From the image to the classes and masks."""
    run = jax.jit(MODEL.apply, static_argnums=2)
    found = run(variables, ARRAYS["in/image"], True)
    for i, logits in enumerate(found.logits):
        np.testing.assert_allclose(logits, ARRAYS[f"out/logits{i}"], atol=5e-6)
    assert np.abs(ARRAYS["out/masks3"]).max() > 10
    np.testing.assert_allclose(found.masks[3], ARRAYS["out/masks3"], atol=1e-4)
    last = run(variables, ARRAYS["in/image"], False)
    np.testing.assert_allclose(last.logits[0], ARRAYS["out/logits_of_transformers"], atol=2e-5)


def test_names_of_the_hub(variables):
    """Every array has the numbers of the one that has its name in detectron2's file."""
    arrays = export_variables(variables, MODEL, HUB)
    pairs = dict(zip(NAMES["hub"], NAMES["detectron2"], strict=True))
    assert arrays.keys() == pairs.keys()
    assert [list(arrays[name].shape) for name in NAMES["hub"]] == NAMES["shapes"]
    for name, theirs in pairs.items():
        expected = WEIGHTS[theirs]
        if len(arrays[name]) < len(expected):  # a third of queries, keys and values
            part = next(i for i, x in enumerate("qkv") if f".{x}" in name.split("self")[1])
            expected = np.split(expected, 3)[part]
        np.testing.assert_array_equal(arrays[name], expected)


@pytest.mark.parametrize("layout", sampled([DETECTRON2, HUB]))
def test_both_directions(variables, layout):
    arrays = export_variables(variables, MODEL, layout)
    jax.tree.map(np.testing.assert_array_equal, import_variables(arrays, MODEL, layout), variables)
    if layout is DETECTRON2:
        jax.tree.map(np.testing.assert_array_equal, arrays, WEIGHTS)


def test_a_file_determines_the_settings(variables):
    sizes = {
        "num_queries": 6, "channels": 32, "num_points": 2, "encoder_depth": 1,
        "encoder_hidden": 32, "depth": 3, "hidden": 32,
    }  # fmt: skip
    for layout, other in ((DETECTRON2, HUB), (HUB, DETECTRON2)):
        arrays = export_variables(variables, MODEL, layout)
        assert layout.missing_marks(arrays) == []
        assert len(other.missing_marks(arrays)) == 3
        # With 8 heads, as in published models, a head has half as many points.
        assert layout.config_entries(arrays)["head_overrides"] == sizes
        assert layout.model_overrides(arrays) == {"window_size": 2}
        assert layout.num_classes(arrays) == 4
        assert layout.num_classes({}) == 0
        assert layout.config_entries({})["head_overrides"] == {}


@pytest.mark.parametrize(
    ("classes", "queries", "kind", "size"),
    [
        (150, 100, "semantic", 640), (150, 200, "panoptic", 640), (100, 200, "instance", 640),
        (133, 100, "panoptic", 1024), (133, 200, "panoptic", 1024), (80, 200, "instance", 1024),
        (7, 10, "panoptic", 1024),
    ],
)  # fmt: skip
def test_what_a_model_was_trained_for(classes, queries, kind, size):
    arrays = {
        "sem_seg_head.predictor.class_embed.weight": np.zeros((classes + 1, 2)),
        "sem_seg_head.predictor.query_feat.weight": np.zeros((queries, 2)),
    }
    assert DETECTRON2.image_size(None, arrays) == size
    entries = DETECTRON2.config_entries(arrays)
    assert entries["inference"] == {"kind": kind}
    config = default_config("masks")
    config.image_size = size
    config.data.update(entries["data"])
    check_sizes(config)
    short_side = {640: 640, 1024: 800}[size]
    assert eval_canvas(config).short_side == short_side


def test_entries_without_a_counterpart(variables):
    """Old names of the queries, and arrays of the loss and of a norm that nothing reads."""
    old = {k.replace("query_feat", "static_query"): x for k, x in WEIGHTS.items()}
    old["criterion.empty_weight"] = np.ones(5, np.float32)
    assert DETECTRON2.missing_marks(old) == []
    again = import_variables(DETECTRON2.prepare(old), MODEL, DETECTRON2)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    arrays = export_variables(variables, MODEL, HUB)
    arrays["model.pixel_level_module.encoder.layernorm.weight"] = np.ones(64, np.float32)
    jax.tree.map(np.testing.assert_array_equal, import_variables(arrays, MODEL, HUB), variables)
    arrays["model.pixel_level_module.encoder.more"] = np.ones(1, np.float32)
    with pytest.raises(UserError, match=r"encoder\.more \(1,\) has no counterpart in the model"):
        import_variables(arrays, MODEL, HUB)


def test_a_missing_array():
    arrays = {k: x for k, x in WEIGHTS.items() if not k.endswith("query_embed.weight")}
    with pytest.raises(UserError, match=r"predictor\.query_embed\.weight is missing"):
        import_variables(arrays, MODEL, DETECTRON2)
