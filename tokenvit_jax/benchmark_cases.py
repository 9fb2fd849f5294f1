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
from tokenvit_jax.ops.group_attention import cheaper_path

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
# (tokens, clusters, channels): blocks of DeiT-S at level 3 of Token Pooling, and K = N / 4.
POOLING_SHAPES = ((194, 187, 384), (187, 163, 384), (118, 85, 384), (196, 49, 384))
# (grid, clusters, channels): Segmenter with ViT-L/16 at 640 x 640, and at 1024 x 2048.
SUPERPIXEL_SHAPES = (((40, 40), (28, 28), 1024), ((64, 128), (32, 64), 1024))
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


def kmedoids_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=POOLING_SHAPES
) -> Iterator[Case]:
    """K-Medoids against its equations as products with the membership of K clusters.

    "masked": in between, one masked sum over N x N distances for all clusters.
    """
    contenders = {
        "products": kmedoids_by_products,
        "masked": kmedoids_by_masks,
        "kmedoids": lambda x, initial: ops.kmedoids(x, initial).indices,
    }
    return _pooling_cases(batch_size, dtype, shapes, contenders)


def kmeans_cases(batch_size: int | None, dtype: jnp.dtype, shapes=POOLING_SHAPES) -> Iterator[Case]:
    """K-Means against its equations as products with the membership of K clusters."""
    contenders = {
        "products": kmeans_by_products,
        "kmeans": lambda x, initial: ops.kmeans(x, initial).centers,
    }
    return _pooling_cases(batch_size, dtype, shapes, contenders)


def _pooling_cases(batch_size, dtype, shapes, contenders):
    batch = batch_size or 8
    for length, num_clusters, channels in shapes:
        tokens = normal(0, (batch, length, channels), dtype)
        draw = np.random.default_rng(1)
        first = np.stack([draw.permutation(length)[:num_clusters] for _ in range(batch)])
        yield Case(
            shape={"tokens": length, "clusters": num_clusters, "channels": channels},
            inputs=(tokens, jnp.asarray(first, jnp.int32)),
            num_differentiated=0,  # of tokens on their way back there are fewer
            contenders=contenders,
        )


def kmedoids_by_products(x: jax.Array, medoids: jax.Array, rounds: int = 5) -> jax.Array:
    """K-Medoids as most write it: (B, N, C), (B, K) -> (B, K), with K x N x N products a round."""
    distances = _all_distances(x)

    def move(_, medoids):
        member = _member(distances, medoids)
        cost = jnp.einsum("bkn,bnm->bkm", member, distances)
        return jnp.where(member > 0, cost, jnp.inf).argmin(-1).astype(jnp.int32)

    return lax.fori_loop(0, rounds, move, medoids)


def kmedoids_by_masks(x: jax.Array, medoids: jax.Array, rounds: int = 5) -> jax.Array:
    """The same with one masked sum over the N x N distances for all clusters."""
    distances = _all_distances(x)

    def move(_, medoids):
        member = _member(distances, medoids)
        assignment = member.argmax(1)
        same = assignment[:, :, None] == assignment[:, None]
        cost = jnp.where(same, distances, 0).sum(1)
        return jnp.where(member > 0, cost[:, None], jnp.inf).argmin(-1).astype(jnp.int32)

    return lax.fori_loop(0, rounds, move, medoids)


def kmeans_by_products(x: jax.Array, initial: jax.Array, rounds: int = 5) -> jax.Array:
    """K-Means as most write it: (B, N, C), (B, K) -> (B, K, C), with two K x N x C products."""
    x = x.astype(jnp.float32)

    def move(_, centers):
        product = jnp.einsum("bkc,bnc->bkn", centers, x)
        nearest = (jnp.sum(centers**2, -1)[..., None] - 2 * product).argmin(1)
        member = jax.nn.one_hot(nearest, centers.shape[1], axis=1)  # (B, K, N)
        count = member.sum(-1, keepdims=True)
        means = jnp.einsum("bkn,bnc->bkc", member, x) / jnp.maximum(count, 1)
        return jnp.where(count > 0, means, centers)

    return lax.fori_loop(0, rounds, move, jnp.take_along_axis(x, initial[..., None], 1))


def _all_distances(x):
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, -1)
    product = jnp.einsum("bnc,bmc->bnm", x, x)
    return jnp.maximum(square[:, :, None] + square[:, None] - 2 * product, 0)


def _member(distances, medoids):
    """Returns 1.0 where a token belongs to a cluster, (B, K, N)."""
    nearest = jnp.take_along_axis(distances, medoids[:, :, None], 1).argmin(1)
    return jax.nn.one_hot(nearest, medoids.shape[1], axis=1)


def cluster_superpixels_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=SUPERPIXEL_SHAPES
) -> Iterator[Case]:
    """Soft clustering within neighbourhoods against the same with all centres and a mask."""
    for grid, clusters, channels in shapes:
        tokens = normal(0, (batch_size or 1, math.prod(grid), channels), dtype)
        sides = {"grid": grid, "clusters": clusters}
        yield Case(
            shape=_superpixel_shape(grid, clusters, channels),
            inputs=(tokens,),
            num_differentiated=0,  # of tokens on their way back there are fewer
            contenders={
                "masked": functools.partial(cluster_superpixels_masked, **sides),
                "tiles": functools.partial(ops.cluster_superpixels, **sides),
            },
        )


def reconstruct_tokens_cases(
    batch_size: int | None, dtype: jnp.dtype, shapes=SUPERPIXEL_SHAPES
) -> Iterator[Case]:
    """Reconstruction from the 20 nearest centres against `lax.top_k` and all neighbours at once."""
    for grid, clusters, channels in shapes:
        batch = batch_size or 1
        few, many = (batch, math.prod(clusters), channels), (batch, math.prod(grid), channels)
        yield Case(
            shape=_superpixel_shape(grid, clusters, channels),
            inputs=tuple(normal(seed, shape, dtype) for seed, shape in enumerate((many, few, few))),
            num_differentiated=3,
            contenders={"top_k": reconstruct_by_top_k, "nearest": ops.reconstruct_tokens},
        )


def _superpixel_shape(grid, clusters, channels):
    names = ("{}x{}".format(*sides) for sides in (grid, clusters))
    return dict(zip(("grid", "clusters"), names, strict=True)) | {"channels": channels}


def cluster_superpixels_masked(
    tokens: jax.Array, grid: tuple[int, int], clusters: tuple[int, int]
) -> jax.Array:
    """Clustering around superpixels as most write it: (B, N, C) -> (B, S, C), N x S weights."""
    x = tokens.astype(jnp.float32)
    averages, homes = [], []
    for length, cells in zip(grid, clusters, strict=True):
        place, cell = np.arange(length), np.arange(cells)[:, None]
        inside = (place >= cell * length // cells) & (place < -(-(cell + 1) * length // cells))
        averages.append(inside / inside.sum(1, keepdims=True))
        homes.append(np.abs(place * cells // length - cell) <= 2)
    rows, columns = homes
    near = (rows[:, None, :, None] & columns[:, None, :]).reshape(math.prod(clusters), -1).T
    maps = x.reshape(len(x), *grid, -1)
    centers = jnp.einsum("iy,jx,byxc->bijc", *averages, maps).reshape(len(x), -1, x.shape[-1])

    def move(_, centers):
        square = jnp.sum(x**2, -1)[..., None] + jnp.sum(centers**2, -1)[:, None]
        distances = square - 2 * jnp.einsum("bnc,bsc->bns", x, centers)
        weights = jax.nn.softmax(jnp.where(near, -distances / 50.0, -jnp.inf), -1)
        return jnp.einsum("bns,bnc->bsc", weights, x) / weights.sum(1)[..., None]

    return lax.fori_loop(0, 5, move, centers).astype(tokens.dtype)


def reconstruct_by_top_k(tokens: jax.Array, centers: jax.Array, refined: jax.Array) -> jax.Array:
    """Reconstruction as most write it: (B, N, C), (B, S, C), (B, S, C) -> (B, N, C)."""
    x, keys = tokens.astype(jnp.float32), centers.astype(jnp.float32)
    square = jnp.sum(x**2, -1)[..., None] + jnp.sum(keys**2, -1)[:, None]
    distances = square - 2 * jnp.einsum("bnc,bsc->bns", x, keys)
    logits, index = lax.top_k(-distances / 50.0, min(20, keys.shape[1]))
    nearest = jax.vmap(lambda values, at: values[at])(refined, index)  # (B, N, k, C)
    return jnp.einsum("bnk,bnkc->bnc", jax.nn.softmax(logits, -1).astype(refined.dtype), nearest)


CASES = {
    "group_attention": group_attention_cases,
    "depthwise_conv": depthwise_conv_cases,
    "dot_product_attention": dot_product_attention_cases,
    "cluster_density_peaks": cluster_density_peaks_cases,
    "kmedoids": kmedoids_cases,
    "kmeans": kmeans_cases,
    "cluster_superpixels": cluster_superpixels_cases,
    "reconstruct_tokens": reconstruct_tokens_cases,
}
