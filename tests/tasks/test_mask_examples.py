"""Examples for segmentation by masks: views, segments and their number; and wrong settings."""

import re

import numpy as np
import pytest
from make_task import check_config, make_task, open_dataset
from ml_collections import ConfigDict
from PIL import Image

from tokenvit_jax.data.record import IGNORED, Record
from tokenvit_jax.data.segment_transforms import GREY, LAYERS, NO_SEGMENT
from tokenvit_jax.data.segments import label_map_of
from tokenvit_jax.errors import UserError
from tokenvit_jax.run_lengths import decode_mask
from tokenvit_jax.tasks import default_config

KINDS = ("semantic", "instance", "panoptic")
SIDE = 128  # of the scenes
CANVAS = 64, 96
each_kind = pytest.mark.parametrize("kind", KINDS)


def make_config(kind, **entries) -> ConfigDict:
    config = default_config("masks")
    config.dataset = "scene_instances" if kind == "instance" else "scene_segments"
    config.inference.kind, config.image_size, config.augment.flip = kind, CANVAS, 0.0
    config.data.max_segments = 8
    for key, value in entries.items():
        if key.endswith("_overrides"):
            config[key] = value
        else:
            config.update_from_flattened_dict({key: value})
    return config


def make_examples(kind, *, train=True, **entries):
    return make_task(make_config(kind, **entries)).examples(train=train)


def read(kind, index, dataset=""):
    return open_dataset(dataset or make_config(kind).dataset, "train").read(index)


def rng(seed=0):
    return np.random.default_rng(seed)


def segments_in(record, kind):
    """Returns class and mask of the segments of a record, crowds left out."""
    if kind == "semantic":
        labels = label_map_of(record)
        return [(c, labels == c) for c in np.unique(labels) if c != IGNORED]
    if kind == "panoptic":
        found = record["segments"]
        rows = zip(found.numbers, found.classes, found.crowd, strict=True)
        return [(c, found.ids == number) for number, c, crowd in rows if not crowd]
    found = record["instances"]
    rows = zip(found.masks, found.classes, found.crowd, strict=True)
    return [(c, decode_mask(counts, (SIDE, SIDE))) for counts, c, crowd in rows if not crowd]


def segments_of_example(example):
    """Returns class and mask of the segments of a training example."""
    classes = example["classes"]
    count = (classes != NO_SEGMENT).sum()
    assert (classes[count:] == NO_SEGMENT).all() and example["segments"].max() <= count
    return [(c, (example["segments"] == i).any(0)) for i, c in enumerate(classes[:count], 1)]


def assert_same_segments(found, expected):
    found, expected = (sorted((int(c), mask.tobytes()) for c, mask in x) for x in (found, expected))
    assert found == expected


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("train", [False, True])
def test_examples_have_the_specs_that_they_declare(kind, train):
    examples = make_examples(kind, train=train, **{"data.result_size": (SIDE, SIDE)})
    layers = LAYERS if kind == "instance" else 1
    for example in (examples(read(kind, 0), rng() if train else None), examples.empty()):
        assert example.keys() == examples.specs.keys()
        for name, spec in examples.specs.items():
            assert example[name].shape == spec.shape and example[name].dtype == spec.dtype, name
    assert train == ("segments" in example)
    if train:
        assert example["segments"].shape == (layers, *CANVAS)
        assert not segments_of_example(example)  # of the empty one


@each_kind
@pytest.mark.parametrize("jitter", [(), (0.5, 0.5)])
def test_segments_lie_where_the_record_has_them(kind, jitter):
    """The view is the whole image in half its size, on a canvas of the same width or a wider one.

    A pixel of the view is the lower right one of four.
    """
    canvas = (128, 160) if jitter else CANVAS
    examples = make_examples(kind, image_size=canvas, **{"augment.jitter": jitter})
    for index in range(3):
        record = read(kind, index)
        example = examples(record, rng())
        padding = [(0, side - SIDE // 2) for side in canvas]
        expected = [(c, np.pad(m[1::2, 1::2], padding)) for c, m in segments_in(record, kind)]
        assert_same_segments(segments_of_example(example), expected)
        assert example["segments_left_out"] == 0
        halved = record["image"].resize((64, 64), Image.Resampling.BILINEAR)
        assert abs(example["image"][:64, :64].astype(int) - np.asarray(halved)).max() <= 1
        assert (example["image"][64:] == GREY).all() and (example["image"][:, 64:] == GREY).all()


@each_kind
def test_segments_move_with_the_pixels_of_a_mirrored_crop(kind):
    examples = make_examples(
        kind, image_size=64, **{"augment.flip": 1.0, "augment.short_sides": (SIDE,)}
    )
    record = read(kind, 1)
    pixels = np.asarray(record["image"])[:, ::-1]
    example = examples(record, rng())
    crops = np.lib.stride_tricks.sliding_window_view(pixels, (64, 64), axis=(0, 1))
    equal = (crops == example["image"].transpose(2, 0, 1)).all((2, 3, 4))
    ((top, left),) = np.argwhere(equal)
    part = slice(top, top + 64), slice(left, left + 64)
    expected = [(c, mask[:, ::-1][part]) for c, mask in segments_in(record, kind)]
    # Only panoptic training keeps segments outside of the crop.
    expected = [(c, mask) for c, mask in expected if kind == "panoptic" or mask.any()]
    assert top > 0 and left > 0
    assert_same_segments(segments_of_example(example), expected)


@pytest.mark.parametrize("kind", ["instance", "panoptic"])
def test_crowds_are_background(kind):
    record = read(kind, 0)
    field = "instances" if kind == "instance" else "segments"
    crowd = np.zeros_like(record[field].crowd)
    crowd[0] = True
    whole = segments_in(record, kind)
    record = Record(**{**record, field: record[field]._replace(crowd=crowd)})
    example = make_examples(kind, image_size=SIDE)(record, rng())
    assert_same_segments(segments_of_example(example), whole[1:])
    others = np.any([mask for _, mask in whole[1:]], 0)
    assert not example["segments"][:, ~others].any() and not others.all()


@pytest.mark.parametrize("kind", ["semantic", "panoptic"])
def test_void_is_background(kind):
    record = read(kind, 0)
    ids = record["segments"].ids.copy()
    ids[:, :20] = 0
    record = Record(image=record["image"], segments=record["segments"]._replace(ids=ids))
    example = make_examples(kind, image_size=SIDE)(record, rng())
    assert_same_segments(segments_of_example(example), segments_in(record, kind))
    assert not example["segments"][:, :, :20].any() and example["segments"][:, :, 20:].all()


@each_kind
def test_an_image_without_segments_is_an_example(kind):
    record = read(kind, 0)
    if kind == "instance":
        record["instances"] = record["instances"]._replace(
            crowd=np.ones_like(record["instances"].crowd)
        )
    else:
        empty = {name: getattr(record["segments"], name)[:0] for name in ("numbers", "classes")}
        crowd, ids = np.zeros(0, bool), np.zeros_like(record["segments"].ids)
        record["segments"] = record["segments"]._replace(ids=ids, crowd=crowd, **empty)
    example = make_examples(kind)(record, rng())
    assert not segments_of_example(example) and not example["segments"].any()
    assert example["segments_left_out"] == 0


@each_kind
def test_the_largest_segments_are_kept_and_the_others_counted(kind):
    record = next(x for x in (read(kind, i) for i in range(40)) if len(segments_in(x, kind)) > 3)
    whole = segments_in(record, kind)
    example = make_examples(kind, image_size=SIDE, **{"data.max_segments": 2})(record, rng())
    largest = sorted(whole, key=lambda pair: -pair[1].sum())[:2]
    assert_same_segments(segments_of_example(example), largest)
    assert example["segments_left_out"] == len(whole) - 2
    assert not example["segments"][:, ~np.any([mask for _, mask in largest], 0)].any()


def test_a_label_map_has_a_segment_for_every_class():
    record = read("semantic", 2, "scenes")
    labels = record["label_map"].copy()
    labels[:9] = IGNORED
    record = Record(image=record["image"], label_map=labels)
    examples = make_examples("semantic", dataset="scenes", image_size=SIDE)
    example = examples(record, rng())
    assert_same_segments(segments_of_example(example), segments_in(record, "semantic"))
    assert not example["segments"][:, :9].any() and example["segments"][:, 9:].all()


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


@each_kind
def test_evaluation_has_a_canvas_for_both_orientations(kind):
    examples = make_examples(kind, train=False, **{"data.result_size": (100, 100)})
    for width, height in ((100, 60), (60, 100), (30, 30)):
        image = Image.new("RGB", (width, height), (9, 8, 7))
        example = examples(Record(image=image), None)
        assert example["image"].shape == (96, 96, 3)
        assert example["original_size"].tolist() == [height, width]
        scale = min(64 / min(width, height), 96 / max(width, height))
        rows, columns = size = example["image_size"].tolist()
        assert size == [round(height * scale), round(width * scale)]
        assert (example["image"][:rows, :columns] == (9, 8, 7)).all()
        assert (example["image"][rows:] == (124, 116, 104)).all()
        assert (example["image"][:, columns:] == (124, 116, 104)).all()


@pytest.mark.parametrize(("size", "result_size"), [
    ((97, 20), (0, 0)), ((20, 97), (0, 0)), ((97, 20), (97, 96)), ((20, 97), (96, 97)),
])  # fmt: skip
def test_an_image_beyond_the_results_is_refused(size, result_size):
    examples = make_examples("panoptic", train=False, **{"data.result_size": result_size})
    room = result_size if any(result_size) else (96, 96)
    message = (
        f"image has {size[0]} x {size[1]} pixels (width x height); valid: at most "
        f"{room[1]} x {room[0]}, config.data.result_size"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        examples(Record(image=Image.new("RGB", size)), None)
    examples(Record(image=Image.new("RGB", room[::-1])), None)


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dataset", "kind"), [
    ("scene_segments", "instance"), ("scene_segments", "panoptic"), ("scene_segments", "semantic"),
    ("scene_instances", "instance"), ("scenes", "semantic"), ("folder", "semantic"),
])  # fmt: skip
def test_datasets_that_have_what_a_kind_reads(dataset, kind):
    config = make_config(kind, dataset=dataset)
    config.data.classes = ("a", "b") if dataset == "folder" else ()
    check_config(config)


INSTANCES = "ade20k_instances, coco, scene_instances, scene_segments"
SEGMENTS = "ade20k_panoptic, coco_panoptic, scene_segments"


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        (
            "instance",
            {"dataset": "scenes"},
            "config.dataset='scenes' has no instances, which config.inference.kind='instance' "
            f"reads; valid: {INSTANCES}",
        ),
        (
            "panoptic",
            {"dataset": "scene_instances"},
            "config.dataset='scene_instances' has no segments, which config.inference.kind="
            f"'panoptic' reads; valid: {SEGMENTS}",
        ),
        (
            "semantic",
            {"dataset": "digits"},
            "config.dataset='digits' has no label_map or segments, which config.inference.kind="
            "'semantic' reads; valid: ade20k, ade20k_panoptic, cityscapes, coco_panoptic, folder, ",
        ),
        (
            "panoptic",
            {"head_overrides": {"num_queries": 7}},
            "config.data.max_segments=8 is above the number of queries; valid: at most "
            "config.head_overrides.num_queries=7",
        ),
        (
            "panoptic",
            {"image_size": (64, 80)},
            "config.image_size: 64 x 80 pixels are not valid; valid: multiples of 32",
        ),
        (
            "panoptic",
            {"data.eval_size": (72, 96)},
            "config.data.eval_size: 72 x 96 pixels are not valid; valid: multiples of 32",
        ),
        (
            "panoptic",
            {"data.eval_short_side": 65},
            "config.data.eval_short_side: 65 pixels do not fit the canvas of evaluation, 64 x 96; "
            "valid: at most 64",
        ),
        (
            "panoptic",
            {"data.eval_size": (96, 64), "data.long_side": 97},
            "config.data.long_side: 97 pixels do not fit the canvas of evaluation, 64 x 96; "
            "valid: at most 96",
        ),
        (
            "semantic",
            {"augment.jitter": (0.5, 2.0), "augment.short_sides": (64,)},
            "config.augment.short_sides=(64,) changes nothing without config.augment.jitter=()",
        ),
        (
            "semantic",
            {"model": "vit_ti"},
            "config.model='vit_ti' is not valid: Mask2Former reads the maps of a hierarchical ",
        ),
        (
            "semantic",
            {"inference.kind": "panoptics"},
            "config.inference.kind='panoptics' is not valid; valid: semantic, instance, panoptic",
        ),
    ],
)
def test_wrong_settings_are_named(kind, entries, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as error:
        check_config(make_config(kind, **entries))
    assert "\n" not in str(error.value)
