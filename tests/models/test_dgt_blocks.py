"""DGT-T with the blocks of Table 4(c): sizes, costs, training and maps of any size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_counts import EXACT
from random_variables import random_variables
from sampled import sampled

import tokenvit_jax as tv
from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import CrossWindowAttention, StridedAttention
from tokenvit_jax.measure.macs import summarize_model

DIMS, HEADS, DEPTHS, SIDES = (64, 128, 256, 512), (2, 4, 8, 16), (1, 2, 17, 2), (56, 28, 14, 7)
STRIPES, STRIDES = (1, 2, 7, 7), (8, 4, 2, 1)
# Parameters and multiply-adds at 224 x 224; the paper states neither.
COUNTS = {
    "swin": (23_736_682, 4_025_595_904),
    "cswin": (23_763_560, 4_126_550_016),
    "cmt": (24_133_544, 3_684_549_632),
}
SMALL = {
    "stem_dim": 8, "dims": (8, 16, 16, 32), "num_heads": (2, 2, 2, 2), "head_dim": 24,
    "num_classes": 5,
}  # fmt: skip
RNG = np.random.default_rng(0)


def block_of(name, stage):
    """Returns parameters and multiply-adds of a block."""
    c, side, stride = DIMS[stage], SIDES[stage], STRIDES[stage]
    length, shrunk = side**2, stride > 1
    if name == "swin":
        return 12 * c**2 + 13 * c + 169 * HEADS[stage], length * c * (12 * c + 2 * 49)
    if name == "cswin":
        keys = STRIPES[stage] * side
        return 12 * c**2 + 23 * c, length * c * (12 * c + 9 + 2 * keys)
    if name == "cmt":
        keys = length // stride**2
        macs = length * c * (10 * c + 45 + 2 * keys + shrunk) + 2 * keys * c**2
        return 12 * c**2 + 81 * c + shrunk * (stride**2 + 3) * c, macs
    pairs = length if stage == 3 else 98 + 48  # Eq. 6: 2 k L C + 2 L G C
    return 12 * c**2 + 81 * c, length * c * (12 * c + 45 + 2 * pairs)


def counts_of(name, depths):
    """Returns the counts of a network: those of DGT-T, with other blocks."""
    found = np.array(EXACT["dgt_t"][:2])
    for stage, depth in enumerate(depths):
        found -= DEPTHS[stage] * np.array(block_of("dgt", stage))
        found += depth * np.array(block_of(name, stage))
    return tuple(found)


@pytest.mark.parametrize("name", sampled(COUNTS))
def test_counts(name):
    """A network of one block per stage is counted; the others follow."""
    assert counts_of(name, DEPTHS) == COUNTS[name]
    model = tv.create_model("dgt_t", block=name, depths=(1, 1, 1, 1))
    found = summarize_model(model, (224, 224), name)
    assert (found.params, found.macs) == counts_of(name, (1, 1, 1, 1))


@pytest.mark.parametrize("name", sampled(COUNTS))
def test_every_parameter_learns_on_maps_of_any_size(name):
    """The maps are 15 x 9, 8 x 5 and 2 x 2: windows, stripes and strides do not divide them."""
    # Only the second block of a stage has shifted windows.
    depths = (1, 2, 0, 1) if name == "swin" else (1, 1, 0, 1)
    model = tv.create_model("dgt_t", **SMALL, depths=depths, block=name)
    images = RNG.normal(size=(2, 60, 36, 3)).astype(np.float32)

    variables = random_variables(model, images)
    assert set(variables) == {"params", "batch_stats"}

    @jax.jit
    @jax.grad
    def grads(params):
        state = {"batch_stats": variables["batch_stats"]}
        logits, _ = model.apply(
            {"params": params, **state}, images, train=True, mutable=["batch_stats"]
        )
        return (logits**2).sum()

    # A BatchNorm cancels what comes before it; a constant added to every key changes nothing.
    unseen = ("norm2/bias", "reduce/bias", "/k/bias", "norm/bias", "shrink/bias")
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads(variables["params"])):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all(), where
        assert where.endswith(unseen) or np.abs(leaf).max() > 0, where


def softmax_rows(q, k, v):
    logits = q @ k.T / np.sqrt(q.shape[1])
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights @ v / weights.sum(1, keepdims=True)


def drawn(module, x, **kwargs):
    shapes = jax.eval_shape(functools.partial(module.init, jax.random.key(0), **kwargs), x)
    return jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), shapes)


def test_cross_windows_equal_the_loops():
    """Stripes of two rows and columns on a map of 3 x 5; the last ones are cut."""
    x = RNG.normal(size=(1, 3, 5, 4)).astype(np.float32)
    module = CrossWindowAttention(2, 2)
    variables = drawn(module, x)
    params = jax.tree.map(np.float64, variables["params"])
    q, k, v = np.split(x[0] @ params["qkv"]["kernel"] + params["qkv"]["bias"], 3, -1)
    y = np.zeros((3, 5, 4))
    for axis, name, half in ((0, "rows", slice(0, 2)), (1, "columns", slice(2, 4))):
        kernel, bias = params[f"position_{name}"]["kernel"], params[f"position_{name}"]["bias"]
        for i, j in np.ndindex(3, 5):
            stripe = [p for p in np.ndindex(3, 5) if p[axis] // 2 == (i, j)[axis] // 2]
            own = np.array([v[p][half] for p in stripe])
            keys = np.array([k[p][half] for p in stripe])
            attended = softmax_rows(q[i, j][None, half], keys, own)[0]
            near = [
                kernel[a - i + 1, b - j + 1] * v[a, b][half]
                for a, b in stripe
                if abs(a - i) < 2 and abs(b - j) < 2
            ]
            y[i, j, half] = attended + sum(near) + bias
    expected = y @ params["proj"]["kernel"] + params["proj"]["bias"]
    np.testing.assert_allclose(module.apply(variables, x)[0], expected, rtol=1e-4, atol=1e-4)


def test_strided_attention_equals_the_loops():
    """Stride 2 on a map of 3 x 4, which is padded to 4 x 4."""
    x = RNG.normal(size=(1, 3, 4, 4)).astype(np.float32)
    module = StridedAttention(2, 2)
    variables = drawn(module, x, train=False)
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    params = jax.tree.map(np.float64, variables["params"])
    padded = np.pad(x[0], ((0, 1), (0, 0), (0, 0))).astype(np.float64)
    small = np.zeros((2, 2, 4))
    for i, j, a, b in np.ndindex(2, 2, 2, 2):
        small[i, j] += padded[2 * i + a, 2 * j + b] * params["shrink"]["kernel"][a, b, 0]
    small += params["shrink"]["bias"]
    stats, norm = variables["batch_stats"]["norm"], params["norm"]
    small = (small - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    line = lambda y, name: y.reshape(-1, 4) @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    q, k, v = line(np.float64(x[0]), "q"), line(small, "k"), line(small, "v")
    halves = [softmax_rows(q[:, h], k[:, h], v[:, h]) for h in (slice(0, 2), slice(2, 4))]
    expected = line(np.concatenate(halves, 1), "proj").reshape(3, 4, 4)
    found = jnp.asarray(module.apply(variables, x, False)[0])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": "vit"}, "block='vit' is not valid; valid"),
        ({"block": "swin", "top_k": 49}, "top_k=49 is not valid; valid: 98 with block='swin'"),
        ({"block": "cmt", "post_norm_cosine": True}, "post_norm_cosine=True is not valid"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        tv.create_model("dgt_t", **settings)


def test_stripes_halve_the_heads():
    with pytest.raises(UserError, match="num_heads=1 must be even: stripes halve the heads"):
        CrossWindowAttention(1, 2).init(jax.random.key(0), jnp.ones((1, 4, 4, 4)))
