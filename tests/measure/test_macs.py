"""Multiply-adds of functions and models, counted from shapes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from exact_counts import EXACT
from jax import lax
from sampled import sampled

from tokenvit_jax import create_model, list_models, ops
from tokenvit_jax.measure.macs import Summary, count_macs, summarize, summarize_model
from tokenvit_jax.published import PUBLISHED


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# Of these, two blocks are counted, of deit_* all: the blocks of a network are equal.
DEEP = list_models("vit_*")


def of_equal_blocks(name):
    """Returns the counts of a network that follow from its first two blocks."""
    one, two = (
        summarize_model(create_model(name, depth=depth), (224, 224), name) for depth in (1, 2)
    )
    more = create_model(name).settings.depth - 1
    return Summary(name, *(a + more * (b - a) for a, b in zip(one[1:], two[1:], strict=True)))


@pytest.mark.parametrize(
    "name",
    sampled(list_models(), keep=("clustr_t", "dgt_t", "pale_t", "swin_t", "swinv2_t", "deit_s")),
)
def test_every_model(name):
    result = of_equal_blocks(name) if name in DEEP else summarize(name, (224, 224))
    assert (result.params, result.macs, result.macs_as_published) == EXACT[name]
    paper = PUBLISHED.get(name)
    if paper is None:
        return
    assert result.params / 1e6 == pytest.approx(paper.params_m, abs=0.8)  # some are whole millions
    if paper.gmacs is not None:
        # Papers round their numbers, and some of their tools count normalisation.
        assert result.macs_as_published / 1e9 == pytest.approx(paper.gmacs, abs=0.07)


def test_products_and_convolutions():
    einsum = lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k)  # noqa: E731
    assert count_macs(einsum, array(2, 5, 3, 8), array(2, 7, 3, 8)) == 2 * 3 * 5 * 7 * 8

    def grouped(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )  # fmt: skip

    macs = count_macs(grouped, array(2, 9, 6, 12), array(3, 3, 3, 8))
    assert macs == 2 * 5 * 3 * 8 * (3 * 3 * 3)


def test_an_operator_counts_by_its_formula():
    q, centroids = array(2, 196, 3, 8), array(3, 5, 8)
    for path in ("dense", "tiles"):
        attend = lambda q, c, path=path: ops.group_attention(q, q, q, c, top_k=20, path=path)  # noqa: E731
        assert count_macs(attend, q, centroids) == 2 * 196 * 24 * (2 * 20 + 2 * 5)
    everything = lambda q, c: ops.group_attention(q, q, q, c, top_k=196)  # noqa: E731
    assert count_macs(everything, q, centroids) == 2 * 2 * 196**2 * 24
    assert count_macs(ops.dot_product_attention, q, q, q) == 2 * 2 * 196**2 * 24
    assert count_macs(ops.depthwise_conv, array(2, 5, 6, 4), array(3, 3, 4)) == 240 * 9


@jax.custom_vjp
def square_product(x):
    return x @ x


square_product.defvjp(lambda x: (x @ x, x), lambda x, dy: (dy @ x.T + x.T @ dy,))


def test_counts_inside_control_flow():
    product = lambda x: x @ x  # noqa: E731
    one = 4**3
    cases = {
        "jit": (jax.jit(product), one),
        "remat": (jax.checkpoint(product), one),
        "custom_vjp": (square_product, one),
        "scan": (lambda x: lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0], 5 * one),
        "fori": (lambda x: lax.fori_loop(0, 3, lambda _, c: c @ c, x), 3 * one),
        "map": (lambda x: lax.map(lambda r: r @ x, x), 4 * 4 * 4),
        "cond": (lambda x: lax.cond(x[0, 0] > 0, product, lambda x: x @ x @ x, x), 2 * one),
        "vmap": (lambda x: jax.vmap(product)(jnp.stack([x, x])), 2 * one),
    }
    counts = {name: count_macs(fn, array(4, 4)) for name, (fn, _) in cases.items()}
    assert counts == {name: expected for name, (_, expected) in cases.items()}


def test_parts_that_a_paper_leaves_out():
    def fn(x):
        with jax.named_scope("rare"):
            x = x @ x
        return ops.dot_product_attention(*[x.reshape(1, 4, 1, 4)] * 3) @ x

    x = array(4, 4)
    attention, one = 2 * 4 * 4 * 4, 4**3
    assert count_macs(fn, x) - count_macs(fn, x, leave_out=("rare",)) == one
    attention_left_out = count_macs(fn, x, leave_out=("dot_product_attention",))
    assert count_macs(fn, x) - attention_left_out == attention


def test_a_loop_of_unknown_length():
    elementwise = lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x)  # noqa: E731
    assert count_macs(elementwise, array(4, 4)) == 0
    with pytest.raises(ValueError, match="while loop, of unknown length"):
        count_macs(lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x), array(4, 4))


def test_linen_layers():
    model = nn.Sequential([nn.Conv(6, (3, 3), (2, 2)), nn.LayerNorm(), nn.Dense(5)])
    x = array(1, 8, 10, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert count_macs(model.apply, variables, x) == 4 * 5 * (6 * 27 + 5 * 6)
