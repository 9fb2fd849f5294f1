"""Segments at the size of the original image, against arrays of the released code."""

from pathlib import Path

import jax
import numpy as np

from tokenvit_jax.tasks.masks.inference import predict_masks

GOLDEN = Path(__file__).parents[1] / "heads" / "golden"
ARRAYS = dict(np.load(GOLDEN / "m2f_inference.npz"))
SIZE = tuple(ARRAYS["original_size"].tolist())
ROOM = 72, 96  # larger than the original image
PADDED = tuple(ARRAYS["padded_size"].tolist())
THINGS = frozenset(ARRAYS["things"].tolist())


def predict(kind, things=None):
    arrays = (ARRAYS[name][None] for name in ("logits", "masks"))
    sizes = (ARRAYS[name][None].astype(np.int32) for name in ("image_size", "original_size"))

    def run(logits, masks, image_size, original_size):
        return predict_masks(
            logits, masks, PADDED, image_size, original_size, room=ROOM, kind=kind, things=things
        )

    found = jax.jit(run)(*arrays, *sizes)
    return {name: np.asarray(x[0]) for name, x in found.items()}


def cut(x):
    return x[..., : SIZE[0], : SIZE[1]]


def test_semantic_labels_equal_the_released_code():
    labels = predict("semantic")["labels"]
    assert labels.dtype == np.uint8 and labels.shape == ROOM
    np.testing.assert_array_equal(cut(labels), ARRAYS["semantic_label_resized_after"])


def test_panoptic_segments_equal_the_released_code():
    found = predict("panoptic", THINGS)
    np.testing.assert_array_equal(cut(found["ids"]), ARRAYS["panoptic"])
    count = len(ARRAYS["panoptic_ids"])
    np.testing.assert_array_equal(found["classes"][:count], ARRAYS["panoptic_classes"])
    assert (found["classes"][count:] == -1).all()
    assert found["ids"].dtype == np.int16


def test_objects_equal_the_released_code():
    """The arrays hold the things among the ten best of all classes."""
    found = predict("instance", THINGS)
    expected = ARRAYS["thing_instance_classes"]
    best = found["scores"][: len(expected)]
    np.testing.assert_allclose(best, ARRAYS["thing_instance_scores"], atol=1e-6)
    np.testing.assert_array_equal(found["classes"][: len(expected)], expected)
    masks = np.unpackbits(found["bits"], axis=-1)
    assert masks[..., SIZE[0] :, :].sum() == masks[..., SIZE[1] :].sum() == 0
    whole = ARRAYS["instance_masks"][np.isin(ARRAYS["instance_classes"], list(THINGS))]
    np.testing.assert_array_equal(cut(masks)[: len(expected)], whole)
    things = found["classes"] >= 0
    assert np.isin(found["classes"][things], list(THINGS)).all() and not masks[~things].any()
