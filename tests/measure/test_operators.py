"""Operators and their alternatives compute the same, and are timed together."""

import chex
import jax
import jax.numpy as jnp
import pytest
from sampled import sampled

from tokenvit_jax.measure import detection_operators, mask_operators, operators
from tokenvit_jax.measure.timing import MIN_CALLS, normal

FLOAT32 = jnp.dtype("float32")


def small_cases():
    yield from operators.group_attention_cases(2, FLOAT32, ((20, 2), (50, 1)))
    yield from operators.depthwise_conv_cases(2, FLOAT32, {"tiny": ((5, 8),)})
    yield from operators.dot_product_attention_cases(2, FLOAT32, ((9, 2, 8),))
    yield from operators.cluster_density_peaks_cases(2, FLOAT32, ((96, 4),))
    yield from operators.kmedoids_cases(2, FLOAT32, ((20, 14, 3),))
    yield from operators.kmeans_cases(2, FLOAT32, ((20, 7, 3),))
    yield from operators.cluster_superpixels_cases(2, FLOAT32, (((13, 9), (9, 7), 4),))
    yield from operators.reconstruct_tokens_cases(2, FLOAT32, (((13, 9), (9, 7), 4),))
    yield from detection_operators.roi_align_cases(
        2, FLOAT32, ((6, 3),), canvas=(64, 96), channels=4
    )
    yield from detection_operators.nms_cases(2, FLOAT32, ((2, 60),))
    yield from detection_operators.select_detections_cases(None, FLOAT32, ((60, 3, 0.05),))
    yield from detection_operators.match_boxes_cases(None, FLOAT32, ((64, 96, 9),))
    yield from mask_operators.assign_targets_cases(2, FLOAT32, ((12, 8, 3), (8, 8, 8)))
    yield from mask_operators.sample_objects_cases(None, FLOAT32, ((32, 5, 60),))


@pytest.mark.parametrize(
    "case", sampled(small_cases(), keep=(0, 8, 12)), ids=lambda case: str(case.shape)
)
def test_contenders_compute_the_same(case):
    # Where the groups select all keys, attention in groups equals dense attention.
    inputs, fns = case.inputs, case.contenders.values()
    if case.num_differentiated:
        result = jax.eval_shape(next(iter(fns)), *inputs)
        inputs = (normal(9, result.shape, result.dtype), *inputs)
        fns = [operators.forward_backward(fn, case.num_differentiated) for fn in fns]
    expected, *others = (jax.jit(fn)(*inputs) for fn in fns)
    for found in others:
        chex.assert_trees_all_close(found, expected, atol=1e-4)


def test_case_with_a_contender_that_does_not_fit(monkeypatch):
    case = next(operators.dot_product_attention_cases(1, FLOAT32, ((64, 2, 8),)))
    row = operators.benchmark_case(case, "train", seconds=0.01)
    timings = row["contenders"]
    assert list(timings) == ["einsum", "jax.nn", "heads_first"]
    ratio = timings["einsum"]["median_ms"] / timings["heads_first"]["median_ms"]
    assert row["speedup"] == pytest.approx(ratio)
    assert timings["einsum"]["temp_mib"] * 2**20 >= 2 * 64 * 64 * 4  # the logits of two heads

    limit = timings["einsum"]["temp_mib"] * 2**20
    monkeypatch.setattr(operators, "fits_memory", lambda num_bytes: num_bytes < limit)
    row = operators.benchmark_case(case, "train", seconds=0.01)
    assert row["speedup"] is None
    assert row["contenders"]["einsum"]["median_ms"] is None
    assert row["contenders"]["heads_first"]["calls"] >= MIN_CALLS


def test_operations_of_equation_7():
    # The paper states these ratios to global attention for DGT-T, below Eq. 7.
    for length, channels, ratio in ((3136, 64, 0.05), (784, 128, 0.19), (196, 256, 0.75)):
        dense = 2 * length**2 * channels
        assert round(operators.equation_6(length, channels) / dense, 2) == ratio
