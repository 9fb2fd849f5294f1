"""Public functions and modules of the layers have the shapes that their types state."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from shape_checks import check_call, missing_annotations, public_callables, trace_checked

from tokenvit_jax import layers

PUBLIC = dict(public_callables(layers))
KEY = jax.random.key(0)
RNGS = {"params": KEY, "routing": KEY, "dropout": KEY}


def floats(*shape):
    return jnp.ones(shape)


MAP, TOKENS = floats(2, 6, 4, 8), floats(2, 30, 8)
CENTROIDS = {"centroids": floats(2, 3, 4), "sums": floats(2, 3, 4), "counts": floats(2, 3)}

FUNCTIONS = {
    "blocks.check_num_heads": ((2, 8), {}),
    "blocks.dense": ((8, jnp.float32), {}),
    "blocks.quick_gelu": ((TOKENS, floats(TOKENS.shape[-1])), {}),
    "cluster_attention.check_ratios": (((4, 2), "clusters"), {}),
    "cluster_attention.cluster_numbers": ((30, (4, 2)), {}),
    "conv.affine_product": ((TOKENS, floats(8, 5), floats(5), floats(8), floats(8)), {}),
    "conv.affine_products": (
        ([TOKENS] * 2, [floats(8, 5)] * 2, [floats(5)] * 2, [floats(8)] * 2, [floats(8)] * 2),
        {},
    ),
    "conv.batch_norm": ((), {"dtype": jnp.float32, "axis_name": None}),
    "conv.convolve_same": ((MAP, floats(3, 3, 8, 5), 2), {}),
    "conv.product": ((TOKENS, floats(8, 5)), {}),
    "conv.uniform_init": ((9,), {}),
    "cosine.cosine_heads": ((floats(2, 30, 3, 8), floats(2, 30, 3, 8), floats(3)), {}),
    "cosine.unit_length": ((TOKENS,), {}),
    "deformable_attention.cell_centers": (((3, 2),), {}),
    "deformable_attention.initial_offsets": ((2, 3, 4), {}),
    "group_attention.advance_centroids": ((CENTROIDS, 0.9), {}),
    "pale_attention.padded_size": ((6, 4, 3, "vanilla"), {}),
    "stochastic.drop_branch": ((MAP, floats(2)), {}),
    "stochastic.image_keys": ((KEY, 2, None), {}),
    "window_attention.resize_bias_table": ((floats(9, 5, 2), (5, 3), (2, 3)), {}),
}
# A module, and the arguments of its call.
MODULES = {
    "blocks.ConditionalPositionEncoding": (layers.ConditionalPositionEncoding(), (MAP,), {}),
    "blocks.DenseParts": (layers.DenseParts(6, 3, jnp.float32), (TOKENS,), {}),
    "blocks.Mlp": (layers.Mlp(2), (TOKENS,), {}),
    "blocks.PatchEmbedding": (layers.PatchEmbedding(5, 3, 2), (floats(2, 6, 5, 3),), {}),
    "cluster_attention.ClusterAttention": (layers.ClusterAttention(2, (4, 2)), (MAP, True), {}),
    "conv.Conv": (layers.Conv(5, 3), (MAP,), {}),
    "conv.Conv3x3": (layers.Conv3x3(5, 2), (floats(2, 6, 5, 3),), {}),
    "conv.ConvModule": (layers.ConvModule(5, 1), (MAP, True), {}),
    "conv.FoldedBatchNorm": (
        layers.conv.FoldedBatchNorm(), (floats(2, 8), 8, 3),
        {"use_running_average": False},
    ),
    "conv.PatchConvTranspose": (layers.PatchConvTranspose(5, 2), (MAP,), {}),
    "conv.ResidualConvUnit": (layers.ResidualConvUnit(), (MAP,), {}),
    "conv.Weights": (layers.conv.Weights((3, 3, 8), jax.nn.initializers.ones), (), {}),
    "cross_window_attention.CrossWindowAttention": (layers.CrossWindowAttention(2, 5), (MAP,), {}),
    "deformable_attention.DeformableAttention": (
        layers.DeformableAttention(2, 3),
        (floats(2, 11, 8), TOKENS, floats(11, 2), ((4, 6), (2, 3))), {},
    ),
    "group_attention.DynamicGroupAttention": (
        layers.DynamicGroupAttention(2, 3, 5, cosine=True), (TOKENS, True), {}
    ),
    "norm.AddLayerNorm": (layers.AddLayerNorm(), (MAP, MAP), {}),
    "norm.BatchNorm": (layers.BatchNorm(), (MAP, False), {}),
    "norm.GroupNorm": (layers.GroupNorm(2), (MAP,), {}),
    "norm.LayerNorm": (layers.LayerNorm(), (TOKENS,), {}),
    "pale_attention.PaleAttention": (layers.PaleAttention(2, 3), (MAP, True), {}),
    "pale_attention.SeparableProjection": (
        layers.pale_attention.SeparableProjection(8), (MAP, True), {}
    ),
    "self_attention.Attention": (
        layers.Attention(2, "learned", 0.02, jnp.float32), (TOKENS,),
        {"scored_by": "all", "size": floats(2, 30)},
    ),
    "stochastic.ChannelDropout": (layers.ChannelDropout(0.5), (MAP, True), {}),
    "stochastic.DropPaths": (layers.DropPaths(0.5, 3), (2, True), {}),
    "stochastic.Dropout": (layers.Dropout(0.5), (TOKENS, True), {}),
    "strided_attention.StridedAttention": (layers.StridedAttention(2, 4), (MAP, True), {}),
    "window_attention.CosineWindowAttention": (
        layers.CosineWindowAttention(2, 3), (MAP, (3, 2), (1, 1)), {}
    ),
    "window_attention.PositionBiasMlp": (
        layers.window_attention.PositionBiasMlp(3), (floats(5, 5, 2),), {}
    ),
    "window_attention.WindowAttention": (
        layers.WindowAttention(2, 3), (MAP, (3, 2), (1, 1)), {"table_window": (3, 3)}
    ),
}  # fmt: skip


def is_module(value):
    return isinstance(value, type) and issubclass(value, nn.Module)


def test_everything_is_called_here():
    """Named tuples are excluded: the calls that return them check their types."""
    named_tuples = {name for name, value in PUBLIC.items() if hasattr(value, "_fields")}
    assert sorted([*FUNCTIONS, *MODULES]) == sorted(set(PUBLIC) - named_tuples)
    assert sorted(MODULES) == sorted(filter(lambda name: is_module(PUBLIC[name]), PUBLIC))


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_has_a_type(name):
    value = PUBLIC[name]
    if is_module(value):
        value = value.__call__
    if inspect.isroutine(value) or name in FUNCTIONS:
        assert not missing_annotations(value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_shapes_that_they_state(name):
    args, kwargs = FUNCTIONS[name]
    trace_checked(PUBLIC[name], *args, **kwargs)


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_the_shapes_that_they_state(name):
    module, args, kwargs = MODULES[name]
    assert type(module) is PUBLIC[name]
    traced = [arg for arg in args[:1] if not isinstance(arg, int)]

    def call(*first):
        # A scope of its own: an attribute of Mlp hides `init`.
        given = (*first, *args[len(first) :])
        y, _ = nn.apply(
            lambda module, *args: module(*args, **kwargs), module, mutable=True
        )({}, *given, rngs=RNGS)  # fmt: skip
        check_call(type(module).__call__, (module, *given), kwargs, y)

    jax.eval_shape(call, *traced)
