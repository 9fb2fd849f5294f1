"""Layouts of mmdetection and of Swin's own code for detection: names, detections, directions."""

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
from tokenvit_jax.ops import paste_masks
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
NAMES = json.loads(gzip.decompress((GOLDEN / "mmdet_names.json.gz").read_bytes()))


@functools.cache
def wide_model(head):
    """Returns a detector as wide as with Swin-T, with one block per stage, and zero variables."""
    config = default_config("detection")
    config.dataset, config.model, config.head = "scene_instances", "swin_t", head
    config.model_overrides = {"depths": (1, 1, 1, 1)}
    model = make_task(config, 80).make_model()
    shapes = variable_shapes(model, jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32))
    return model, jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)


@pytest.mark.parametrize(
    ("names", "layout", "head", "settings"),
    sampled([
        (
            "mask_rcnn_swin_t.mmdet", "mmdet", "mask_rcnn",
            {"channels": 256, "hidden": 1024, "num_mask_convs": 4},
        ),
        (
            "mask_rcnn_swin_t.original", "swin_detection", "mask_rcnn",
            {"channels": 256, "hidden": 1024, "num_mask_convs": 4},
        ),
        ("retinanet_swin_t.mmdet", "mmdet", "retinanet", {"channels": 256, "num_convs": 4}),
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
    computed = "relative_position_index"
    expected = {name: file[name].shape for name in wanted if not name.endswith(computed)}
    assert {name: x.shape for name, x in arrays.items()} == expected
    assert found.num_classes(file) == 80
    assert found.model_overrides(file) == {"window_size": 7}
    entries = found.config_entries(file)
    assert (entries["head"], entries["head_overrides"]) == (head, settings)
    scalars = {name: np.zeros((), np.float32) for name in file}
    assert found.num_classes(scalars) == 0
    assert not {"channels", "hidden"} & found.config_entries(scalars)["head_overrides"].keys()


def test_detectors_without_masks_and_other_cascades_are_refused():
    names = dict.fromkeys(NAMES["mask_rcnn_swin_t.original"], np.zeros(()))
    for pattern, name in (("mask_head.*", "x"), ("_head", "_head.0")):
        others = {re.sub(pattern, name, key): x for key, x in names.items()}
        message = (
            r"the nearest is --layout=swin_detection, which has roi_head.mask_head.conv_logits"
        )
        with pytest.raises(UserError, match=message):
            recognise_layout(others, "swin_t")


def test_layouts_by_task():
    assert layouts_of("swin_t", "detection") == ["mmdet", "swin_detection"]


@pytest.mark.slow
def test_detections_equal_mmdetection(tmp_path):
    """The arrays are those of Swin's own code, the detections those of mmdetection's."""
    golden = dict(np.load(GOLDEN / "mask_rcnn_swin_160x192.npz"))
    arrays = {k.removeprefix("w/"): x for k, x in golden.items() if k.startswith("w/")}
    source, workdir, back = (tmp_path / name for name in ("a.safetensors", "run", "b.safetensors"))
    save_file(arrays, source)
    settings = {"dims": (8, 16, 32, 64), "num_heads": (1, 2, 2, 4), "depths": (2, 2, 2, 2)}
    choices = Choices(model_overrides=settings)
    lines = import_file(source, workdir, "swin_t", choices=choices)
    assert lines[0] == "swin_t, layout swin_detection, 5 classes, image_size (800, 1344)"
    assert "normalization=imagenet" in lines[1]
    run = load_run(workdir)
    sizes = {"channels": 16, "hidden": 32, "num_mask_convs": 4}
    assert run.config.head_overrides.to_dict() == sizes
    assert (run.config.data.eval_short_side, run.config.data.long_side) == (800, 1333)
    head = run.model.head.clone(num_candidates=80, num_proposals=48, max_detections=20)
    model = run.model.clone(head=head)

    @jax.jit
    def detect(variables, images, size):
        maps = model.apply(variables, images, False, method="head_inputs")[0]
        return maps, model.apply(variables, images, image_size=size)

    images = golden["in/image_normalised"].transpose(0, 2, 3, 1).astype(np.float32)
    maps, found = detect(run.variables, images, golden["in/image_shape"][None])
    expected = golden["out/c5"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(maps[3], expected, atol=1e-5)
    boxes = found.boxes[0] / np.tile(golden["in/scale_factor_wh"], 2)
    np.testing.assert_allclose(boxes, golden["out/boxes"], atol=1e-3)
    np.testing.assert_array_equal(found.classes[0], golden["out/labels"])
    np.testing.assert_allclose(found.scores[0], golden["out/scores"], atol=1e-4)
    masks = np.asarray(paste_masks(found.masks[0], boxes, (120, 145))) >= 0.5
    assert (masks != np.unpackbits(golden["out/masks"], axis=-1, count=145)).sum() <= 5

    # The same weights under the names of mmdetection give the same parameters.
    assert export_run(workdir, back, "auto", "last") == ["swin_t, layout mmdet"]
    renamed = load_file(back)
    assert recognise_layout(renamed, "swin_t") == "mmdet"
    again = import_variables(renamed, run.model, LAYOUTS["mmdet"]["swin"])
    jax.tree.map(np.testing.assert_array_equal, again, run.variables)
    original = export_variables(run.variables, run.model, LAYOUTS["swin_detection"]["swin"])
    jax.tree.map(np.testing.assert_array_equal, original, arrays)


def cascade():
    """Returns HTC in mmdetection's names; backbone and proposals are those of the network above."""
    golden = np.load(GOLDEN / "mask_rcnn_swin_160x192.npz")
    arrays = {k: golden[k] for k in golden if k.startswith(("w/backbone", "w/neck", "w/rpn"))}
    for name in ("htc_weights", "htc_hidden_layers"):
        arrays |= np.load(GOLDEN.parent.parent / "heads" / "golden" / f"{name}.npz")
    return {name.removeprefix("w/"): array for name, array in arrays.items()}


@pytest.mark.slow
def test_boxes_of_a_cascade_equal_mmdetection(tmp_path):
    """All three stages, for given levels and proposals, with soft suppression."""
    arrays, expected = cascade(), np.load(GOLDEN.parent.parent / "heads" / "golden" / "htc.npz")
    save_file(arrays, tmp_path / "a.safetensors")
    settings = {"dims": (8, 16, 32, 64), "num_heads": (1, 2, 2, 4), "depths": (2, 2, 2, 2)}
    choices = Choices(model_overrides=settings)
    lines = import_file(tmp_path / "a.safetensors", tmp_path / "run", "swin_t", choices=choices)
    assert lines[0] == "swin_t, layout swin_detection, 5 classes, image_size (800, 1344)"
    run = load_run(tmp_path / "run")
    assert run.config.head == "htc"
    assert run.config.head_overrides.to_dict() == {
        "channels": 16, "hidden": 32, "num_mask_convs": 4, "num_stuff": 11, "num_box_convs": 4,
        "global_head_dim": 0,
    }  # fmt: skip
    head = run.model.head.clone(max_detections=20)

    @jax.jit
    def detect(params, levels, proposals, size):
        apply = functools.partial(head.apply, {"params": params})
        pyramid = apply(levels, (4, 8, 16, 32, 64), method="pyramid")
        return head.select(apply(pyramid, proposals, size, method="classify"))

    levels = [expected[f"inference/in/p{i}"].transpose(0, 2, 3, 1) for i in range(2, 7)]
    proposals, size = (expected[f"inference/in/{x}"] for x in ("proposals", "image_shape"))
    params = run.variables["params"]["head"]
    found = detect(params, levels, proposals[None], size[None].astype(np.int32))
    np.testing.assert_array_equal(found.classes[0], expected["inference/out/labels"])
    np.testing.assert_allclose(found.scores[0], expected["inference/out/scores"], atol=1e-5)
    np.testing.assert_allclose(found.boxes[0], expected["inference/out/boxes_unscaled"], atol=1e-4)

    renamed = export_variables(run.variables, run.model, LAYOUTS["mmdet"]["swin"])
    assert recognise_layout(renamed, "swin_t") == "mmdet"
    for layout, names in (("mmdet", renamed), ("swin_detection", arrays)):
        again = import_variables(names, run.model, LAYOUTS[layout]["swin"])
        jax.tree.map(np.testing.assert_array_equal, again, run.variables)
    original = export_variables(run.variables, run.model, LAYOUTS["swin_detection"]["swin"])
    jax.tree.map(np.testing.assert_array_equal, original, arrays)


def test_names_of_the_block_in_front_of_the_pyramid():
    """Those of HTC++ as ViT's adapters have it."""
    model, variables = wide_model("htc")
    layout = LAYOUTS["mmdet"]["swin"]
    arrays = export_variables(variables, model, layout)
    vectors = ("norm1", "norm2", "final_norm", "attn.proj", "ffn.fc2")
    shapes = {f"{name}.bias": (768,) for name in vectors} | {
        "norm1.weight": (768,), "norm2.weight": (768,), "final_norm.weight": (768,),
        "attn.qkv.weight": (2304, 768), "attn.qkv.bias": (2304,), "attn.proj.weight": (768, 768),
        "ffn.fc1.weight": (3072, 768), "ffn.fc1.bias": (3072,), "ffn.fc2.weight": (768, 3072),
    }  # fmt: skip
    block = {k.removeprefix("neck.0."): x.shape for k, x in arrays.items() if "neck.0." in k}
    assert block == shapes
    assert {k for k in arrays if k.startswith("neck.") and "neck.0." not in k} == {
        f"neck.1.{kind}_convs.{i}.conv.{part}"
        for kind in ("lateral", "fpn")
        for i in range(4)
        for part in ("weight", "bias")
    }
    assert recognise_layout(arrays, "swin_t") == "mmdet" and layout.num_classes(arrays) == 80
    entries = layout.config_entries(arrays)
    assert (entries["head"], entries["head_overrides"]) == (
        "htc",
        {
            "channels": 256, "hidden": 1024, "num_mask_convs": 4, "num_stuff": 183,
            "num_box_convs": 4,
        },
    )  # fmt: skip


def test_channels_of_the_first_hidden_layer():
    """Its inputs are channels first there, rows first here."""
    model, _ = wide_model("mask_rcnn")
    rules = LAYOUTS["mmdet"]["swin"].rules(model)
    rule = next(rule for rule in rules if rule.ours == "head/box_head/fc1/kernel")
    theirs = np.arange(2 * 3 * 49).reshape(2, -1)  # two outputs, three channels
    features = np.random.default_rng(0).integers(9, size=(7, 7, 3))
    expected = theirs @ features.transpose(2, 0, 1).ravel()
    np.testing.assert_array_equal(features.ravel() @ rule.change.to_ours(theirs), expected)
    np.testing.assert_array_equal(rule.change.to_theirs(rule.change.to_ours(theirs)), theirs)
