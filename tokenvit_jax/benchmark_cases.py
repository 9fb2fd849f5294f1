"""Operators at the shapes of the models, each with its obvious alternatives, to be measured."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tokenvit_jax import ops
from tokenvit_jax.ops.group_attention_paths import cheaper_path

# Of DGT: Table 1 of the paper.
HEAD_DIM, NUM_GROUPS, TOP_K = 32, 48, 98
# (length, heads): stages 3, 2 and 1 of DGT-T at 224 x 224, and stage 1 at 512 x 512.
GROUP_ATTENTION_SHAPES = ((196, 8), (784, 4), (3136, 2), (16384, 2))
# (side, channels): the convolution inside the feed-forward network of each stage at 224 x 224.
DEPTHWISE_SHAPES = {
    "dgt_t": ((56, 256), (28, 512), (14, 1024), (7, 2048)),
    "dgt_b": ((56, 512), (28, 1024), (14, 2048), (7, 4096)),
}
# (length, heads, head dim): stage 4 of DGT-T; DeiT-S; DeiT-S at 384 x 384.
ATTENTION_SHAPES = ((49, 16, 32), (197, 6, 64), (577, 6, 64))
# (tokens, channels): stage 1 of ClusTR at 224 x 224, 512 x 512 and 800 x 1344.
CLUSTER_SHAPES = ((3136, 64), (16384, 64), (67200, 64))
# Tokens per cluster of ClusTR's fine scale in stage 1.
CLUSTER_RATIO = 16


class Case(NamedTuple):
    """One operator at one shape.

    shape: what describes it in the output. inputs: arrays. num_differentiated: how many of the
    inputs have a gradient; unless it is 0, the result has the shape of the first. contenders: name
    -> function of the inputs; ours is the last, the obvious alternative the first.
    """

    shape: dict[str, Any]
    inputs: tuple[jax.Array, ...]
    num_differentiated: int
    contenders: dict[str, Callable[..., jax.Array]]


def normal(seed: int, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Returns normal random numbers, the same for the same seed."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def einsum_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention as most write it: (B, L, N, D) in, no thought about the layout."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), v)


def group_attention_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=GROUP_ATTENTION_SHAPES
) -> Iterator[Case]:
    """Attention in dynamic groups against attention of all queries with all keys.

    "Eq. 7" is the speed-up that the paper's operation counts promise: 2L^2C against
    2kLC + 2LGC + kG log L.
    """
    for length, heads in shapes:
        shape = (batch_size or 1, length, heads, HEAD_DIM)
        yield Case(
            shape={
                "length": length,
                "heads": heads,
                "path": cheaper_path(length, NUM_GROUPS, min(TOP_K, length)),
                "eq7": 2 * length**2 * heads * HEAD_DIM / equation_6(length, heads * HEAD_DIM),
            },
            inputs=(
                *(normal(seed, shape, dtype) for seed in range(3)),
                normal(3, (heads, NUM_GROUPS, HEAD_DIM)),
            ),
            num_differentiated=3,
            contenders={
                "einsum": lambda q, k, v, _: einsum_attention(q, k, v),
                "heads_first": lambda q, k, v, _: ops.dot_product_attention(q, k, v),
                "group": lambda q, k, v, c: ops.group_attention(q, k, v, c, top_k=TOP_K).output,
            },
        )


def equation_6(length: int, channels: int) -> float:
    """Returns 2kLC + 2LGC + kG log L, the operations of group attention (Eq. 6 of DGT)."""
    per_channel = 2 * TOP_K * length + 2 * length * NUM_GROUPS
    return per_channel * channels + TOP_K * NUM_GROUPS * math.log2(length)


def depthwise_conv_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=DEPTHWISE_SHAPES
) -> Iterator[Case]:
    """3x3 depthwise convolution against XLA's with one feature group per channel."""

    def grouped(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel[:, :, None],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )

    for model, sizes in shapes.items():
        for side, channels in sizes:
            yield Case(
                shape={"model": model, "side": side, "channels": channels},
                inputs=(
                    normal(0, (batch_size or 8, side, side, channels), dtype),
                    normal(1, (3, 3, channels), dtype),
                ),
                num_differentiated=2,
                contenders={"feature_groups": grouped, "depthwise_conv": ops.depthwise_conv},
            )


def dot_product_attention_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=ATTENTION_SHAPES
) -> Iterator[Case]:
    """Attention of all queries with all keys against plain einsum and JAX's own function."""
    for length, heads, dim in shapes:
        shape = (batch_size or 8, length, heads, dim)
        yield Case(
            shape={"length": length, "heads": heads, "head_dim": dim},
            inputs=tuple(normal(seed, shape, dtype) for seed in range(3)),
            num_differentiated=3,
            contenders={
                "einsum": einsum_attention,
                "jax.nn": jax.nn.dot_product_attention,
                "heads_first": ops.dot_product_attention,
            },
        )


def cluster_density_peaks_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=CLUSTER_SHAPES
) -> Iterator[Case]:
    """Clustering by density peaks against the same with all distances of an image at once.

    Clusters have no gradient. Of the longest input the obvious form is compiled only: it does not
    fit into the memory of most machines.
    """
    for length, channels in shapes:
        num_clusters = length // CLUSTER_RATIO
        cluster = functools.partial(ops.cluster_density_peaks, num_clusters=num_clusters)
        yield Case(
            shape={"tokens": length, "channels": channels, "clusters": num_clusters},
            inputs=(normal(0, (batch_size or 1, length, channels), dtype),),
            num_differentiated=0,
            contenders={
                "unchunked": functools.partial(cluster_unchunked, num_clusters=num_clusters),
                "density_peaks": lambda x, cluster=cluster: cluster(x).assignment,
            },
        )


def cluster_unchunked(tokens: jax.Array, num_clusters: int, neighbors: int = 5) -> jax.Array:
    """Clustering by density peaks as most write it: (B, N, C) -> (B, N), with N^2 distances."""
    x = tokens.astype(jnp.float32)
    square = jnp.sum(x * x, -1)
    products = jnp.einsum("bnc,bmc->bnm", x, x)
    distance = jnp.sqrt(jnp.maximum(square[:, :, None] + square[:, None] - 2 * products, 0))
    distance /= x.shape[-1] ** 0.5
    nearest = -lax.top_k(-distance, neighbors)[0]
    density = jnp.exp(-jnp.mean(nearest**2, -1))
    is_denser = density[:, None] > density[:, :, None]
    delta = jnp.where(is_denser, distance, jnp.inf).min(-1)
    delta = jnp.where(jnp.isinf(delta), distance.max((1, 2))[:, None], delta)
    centers = lax.top_k(density * delta, num_clusters)[1]
    assignment = jnp.take_along_axis(distance, centers[:, None], 2).argmin(-1)
    own = jnp.arange(num_clusters)
    return jax.vmap(lambda row, center: row.at[center].set(own))(assignment, centers)


CASES = {
    "group_attention": group_attention_cases,
    "depthwise_conv": depthwise_conv_cases,
    "dot_product_attention": dot_product_attention_cases,
    "cluster_density_peaks": cluster_density_peaks_cases,
}
