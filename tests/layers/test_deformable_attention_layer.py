"""The layer of deformable attention against Mask2Former's arrays."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import DeformableAttention, cell_centers
from tokenvit_jax.layers.deformable_attention import initial_offsets

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "deformable_attention.npz"))
SHAPES = tuple(map(tuple, GOLDEN["shapes"].tolist()))
NAMES = {
    "sampling_offsets": "offsets", "attention_weights": "weights", "value_proj": "value",
    "output_proj": "output",
}  # fmt: skip
PARAMS = {
    ours: {
        "kernel": GOLDEN[f"w:{theirs}.weight"].T, "bias": GOLDEN[f"w:{theirs}.bias"],
    } for theirs, ours in NAMES.items()
}  # fmt: skip
CENTERS = np.concatenate([cell_centers(size) for size in SHAPES])


def test_equals_mask2formers():
    layer = DeformableAttention(int(GOLDEN["heads"]))

    @jax.jit
    def run(query, value):
        apply = lambda *x: layer.apply({"params": PARAMS}, *x, CENTERS, SHAPES)  # noqa: E731
        y, pull = jax.vjp(apply, query, value)
        return y, *pull(GOLDEN["probe"])

    y, query, value = run(GOLDEN["query"], GOLDEN["value"])
    np.testing.assert_allclose(y, GOLDEN["output"], atol=1e-6)
    np.testing.assert_allclose(query, GOLDEN["grad_query"], atol=1e-5)
    np.testing.assert_allclose(value, GOLDEN["grad_value"], atol=1e-5)


def test_centers_equal_mask2formers_references():
    for level in range(len(SHAPES)):
        for reference in GOLDEN["reference"][:, :, level]:
            np.testing.assert_allclose(CENTERS, reference, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("initial")])
def test_initial_offsets_equal_mask2formers(name):
    heads, maps, points, _ = GOLDEN[name].shape
    np.testing.assert_allclose(initial_offsets(heads, maps, points), GOLDEN[name], atol=1e-6)


def test_initial_parameters():
    layer = DeformableAttention(4, 3)
    query = jnp.ones((1, len(CENTERS), 8))
    params = layer.init(jax.random.key(0), query, query, CENTERS, SHAPES)["params"]
    np.testing.assert_allclose(
        params["offsets"]["bias"].reshape(4, 3, 3, 2), initial_offsets(4, 3, 3)
    )
    assert not np.any(params["offsets"]["kernel"])
    assert not any(map(np.any, params["weights"].values()))
    for name in ("value", "output"):
        assert 0.5 < np.abs(params[name]["kernel"]).max() < np.sqrt(6 / 16)
        assert not np.any(params[name]["bias"])


def test_wrong_heads():
    query = jnp.ones((1, len(CENTERS), 8))
    with pytest.raises(UserError, match="num_heads=3 does not divide 8 channels"):
        DeformableAttention(3).init(jax.random.key(0), query, query, CENTERS, SHAPES)
