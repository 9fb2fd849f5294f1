"""Operators and training steps lower for accelerators on a host without accelerators."""

import functools

import jax
import jax.numpy as jnp
import pytest
from lowering import array, lowers, step_lowers
from sampled import sampled
from shipped_configs import load_config

from tokenvit_jax import ops


def gradient(fn, num_differentiated):
    """Returns the gradient of the sum of squares of the first result of fn."""

    def loss(*args):
        output = fn(*args)
        output = output[0] if isinstance(output, tuple) else output
        return jnp.sum(output.astype(jnp.float32) ** 2)

    return jax.grad(loss, tuple(range(num_differentiated)))


def group_attention(path, top_k):
    return lambda q, k, v, c: ops.group_attention(q, k, v, c, top_k=top_k, path=path)


@pytest.mark.parametrize(
    "dtype", sampled([jnp.bfloat16, jnp.float32]), ids=lambda dtype: dtype.__name__
)
@pytest.mark.parametrize(
    ("path", "top_k"), [("dense", 98), ("tiles", 98), ("auto", 1000)], ids=["dense", "tiles", "all"]
)
def test_group_attention(path, top_k, dtype):
    q, centroids = array(2, 196, 2, 32, dtype=dtype), array(2, 48, 32)
    fn = group_attention(path, top_k)
    lowers(fn, q, q, q, centroids)
    lowers(gradient(fn, 3), q, q, q, centroids)


@pytest.mark.parametrize("precision", sampled(["high", "highest"]))
def test_precision_that_bfloat16_does_not_have(precision):
    """Mosaic, for TPUs, knows one precision of bfloat16, and stops at any other one."""
    q, long = (array(2, length, 2, 64, dtype=jnp.bfloat16) for length in (49, 1024))
    with jax.default_matmul_precision(precision):
        lowers(gradient(group_attention("dense", 7), 3), q, q, q, array(2, 8, 64))
        lowers(gradient(ops.dot_product_attention, 3), long, long, long)
        lowers(lambda x: ops.cluster_density_peaks(x, 20), array(2, 300, 16, dtype=jnp.bfloat16))


@pytest.mark.parametrize(
    "dtype", sampled([jnp.bfloat16, jnp.float32]), ids=lambda dtype: dtype.__name__
)
def test_other_operators(dtype):
    q = array(2, 49, 2, 32, dtype=dtype)
    x, kernel = array(2, 7, 9, 16, dtype=dtype), array(3, 3, 16, dtype=dtype)
    lowers(ops.dot_product_attention, q, q, q)
    lowers(gradient(ops.dot_product_attention, 3), q, q, q)
    lowers(ops.depthwise_conv, x, kernel)
    lowers(gradient(ops.depthwise_conv, 2), x, kernel)
    scale = array(16)
    norm = lambda x, y, scale: ops.add_layer_norm(x, y, scale, scale, epsilon=1e-6)  # noqa: E731
    lowers(norm, x, x, scale)
    lowers(gradient(norm, 3), x, x, scale)
    groups, centroids = array(2, 2, 49, dtype=jnp.int32), array(2, 5, 32)
    lowers(
        lambda c, q, groups: ops.update_centroids(c, q, groups, old_weight=0.9),
        centroids, q, groups,
    )  # fmt: skip
    tokens, scores = array(2, 300, 16, dtype=dtype), array(2, 300)
    lowers(lambda x: ops.cluster_density_peaks(x, 20), tokens)

    def merge(x, scores):
        return ops.merge_tokens(x, ops.cluster_density_peaks(x, 20).assignment, 20, scores)

    lowers(gradient(merge, 2), tokens, scores)
    q = array(2, 14, 14, 2, 32, dtype=dtype)
    lowers(gradient(ops.pale_attention, 3), q, q, q)
    attend = functools.partial(ops.window_attention, window=(7, 7), shift=(3, 3))
    lowers(gradient(attend, 4), q, q, q, array(2, 49, 49))
    initial = array(2, 20, dtype=jnp.int32)

    def expedite(x):
        centers = ops.cluster_superpixels(x, (15, 20), (11, 9))
        return ops.reconstruct_tokens(x, centers, centers)

    lowers(gradient(expedite, 1), tokens)
    lowers(ops.kmedoids, tokens, initial, scores)
    lowers(gradient(lambda x, w, initial: ops.kmeans(x, initial, w), 2), tokens, scores, initial)
    q = array(2, 49, 2, 32, dtype=dtype)
    lowers(gradient(ops.scored_attention, 3), q, q, q)

    def act(q):
        return ops.clustered_attention(q, q, q, ops.hash_clusters(q[:, 1:], 9), 9)

    lowers(gradient(act, 1), q)


@pytest.mark.slow  # by default, tests/test_lowering_hosts.py lowers a training step
@pytest.mark.parametrize(
    ("name", "depths"),
    [
        # Widths that are no powers of two, cosine attention in groups and to all tokens.
        ("dgt_s", (1, 0, 0, 1)),
        # One block per stage at the published widths: the other blocks lower like these.
        ("dgt_t", (1, 1, 1, 1)), ("clustr_t", (1, 1, 1, 1)), ("pale_t", (1, 1, 1, 1)),
    ],
)  # fmt: skip
def test_training_step(name, depths):
    config = load_config(name)
    config.model_overrides.depths = depths
    step_lowers(config)
