"""Operators for any number of images: forms and chunks are those of a single image."""

import importlib

import jax
import numpy as np
import pytest
from jax import export
from sampled import sampled

from tokenvit_jax import ops
from tokenvit_jax.kernels import cluster_sums, platforms
from tokenvit_jax.ops import chunks


def floats(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


TOKENS, MAP = floats(2, 71, 4), floats(2, 6, 8, 2, 4)
HEADS, BIAS = floats(2, 71, 2, 4), floats(2, 12, 12)
CLUSTERS = np.random.default_rng(0).integers(5, size=(2, 71), dtype=np.int32)

CASES = {  # operator of arrays with a leading axis of images, and the arrays
    "attention": (lambda q: ops.dot_product_attention(q, q, q), HEADS),
    "windows": (lambda q: ops.window_attention(q, q, q, BIAS, window=(3, 4)), MAP),
    "pale": (lambda q: ops.pale_attention(q, q, q, pale=(3, 2)), MAP),
    "density peaks": (lambda x: ops.density_peaks(x).delta, TOKENS),
    "sums": (lambda x, at: cluster_sums.sums_by_products(x, at, 5, chunk=100), TOKENS, CLUSTERS),
}


@pytest.mark.parametrize("name", sampled(CASES, keep=("attention", "sums")))
def test_chunks_of_one_image(monkeypatch, name):
    # An image exceeds these limits, so its result takes several steps.
    for module in ("kernels.chunked", "ops.pale_attention", "ops.window_attention"):
        module = importlib.import_module(f"tokenvit_jax.{module}")  # `ops` has equal names
        monkeypatch.setattr(module, "MAX_LOGITS", 500)
    monkeypatch.setattr(chunks, "CPU_CHUNK", 2000)
    run, *arrays = CASES[name]
    (batch,) = export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in arrays]
    exported = export.export(jax.jit(run), platforms=["cpu"])(*shapes)
    assert "stablehlo.while" in exported.mlir_module()
    found = jax.jit(exported.call)(*arrays)
    np.testing.assert_allclose(found, run(*arrays), rtol=1e-5, atol=1e-5)


def test_a_known_batch_is_planned_as_it_is():
    assert platforms.device_batch(3) == 3
    assert platforms.device_batch(export.symbolic_shape("4*b")[0]) == 1
