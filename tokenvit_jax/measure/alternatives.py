"""Operators written in the obvious way, for comparison with the operators of this package."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tokenvit_jax import ops

# Defaults of the operators.
ROUNDS = 5  # of K-Medoids, K-Means and superpixels
NEIGHBORS = 5  # of density peaks


def einsum_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes attention on (B, L, N, D) arrays without changing their layout."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), v)


def cluster_unchunked(tokens: jax.Array, num_clusters: int) -> jax.Array:
    """Clusters by density peaks with all N x N distances at once: (B, N, C) -> (B, N)."""
    x = tokens.astype(jnp.float32)
    square = jnp.sum(x * x, -1)
    products = jnp.einsum("bnc,bmc->bnm", x, x)
    distance = jnp.sqrt(jnp.maximum(square[:, :, None] + square[:, None] - 2 * products, 0))
    distance /= x.shape[-1] ** 0.5
    nearest = -lax.top_k(-distance, NEIGHBORS)[0]
    density = jnp.exp(-jnp.mean(nearest**2, -1))
    is_denser = density[:, None] > density[:, :, None]
    delta = jnp.where(is_denser, distance, jnp.inf).min(-1)
    delta = jnp.where(jnp.isinf(delta), distance.max((1, 2))[:, None], delta)
    centers = lax.top_k(density * delta, num_clusters)[1]
    assignment = jnp.take_along_axis(distance, centers[:, None], 2).argmin(-1)
    own = jnp.arange(num_clusters)
    return jax.vmap(lambda row, center: row.at[center].set(own))(assignment, centers)


def kmedoids_by_products(x: jax.Array, medoids: jax.Array) -> jax.Array:
    """Runs K-Medoids by K x N x N products per round: (B, N, C), (B, K) -> (B, K)."""
    distances = _all_distances(x)

    def move(_, medoids):
        member = _member(distances, medoids)
        cost = jnp.einsum("bkn,bnm->bkm", member, distances)
        return jnp.where(member > 0, cost, jnp.inf).argmin(-1).astype(jnp.int32)

    return lax.fori_loop(0, ROUNDS, move, medoids)


def kmedoids_by_masks(x: jax.Array, medoids: jax.Array) -> jax.Array:
    """Runs K-Medoids by one masked sum over the N x N distances per round."""
    distances = _all_distances(x)

    def move(_, medoids):
        member = _member(distances, medoids)
        assignment = member.argmax(1)
        same = assignment[:, :, None] == assignment[:, None]
        cost = jnp.where(same, distances, 0).sum(1)
        return jnp.where(member > 0, cost[:, None], jnp.inf).argmin(-1).astype(jnp.int32)

    return lax.fori_loop(0, ROUNDS, move, medoids)


def kmeans_by_products(x: jax.Array, initial: jax.Array) -> jax.Array:
    """Runs K-Means by two K x N x C products per round: (B, N, C), (B, K) -> (B, K, C)."""
    x = x.astype(jnp.float32)

    def move(_, centers):
        product = jnp.einsum("bkc,bnc->bkn", centers, x)
        nearest = (jnp.sum(centers**2, -1)[..., None] - 2 * product).argmin(1)
        member = jax.nn.one_hot(nearest, centers.shape[1], axis=1)  # (B, K, N)
        count = member.sum(-1, keepdims=True)
        means = jnp.einsum("bkn,bnc->bkc", member, x) / jnp.maximum(count, 1)
        return jnp.where(count > 0, means, centers)

    return lax.fori_loop(0, ROUNDS, move, jnp.take_along_axis(x, initial[..., None], 1))


def _all_distances(x):
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, -1)
    product = jnp.einsum("bnc,bmc->bnm", x, x)
    return jnp.maximum(square[:, :, None] + square[:, None] - 2 * product, 0)


def _member(distances, medoids):
    """Returns the membership of tokens in clusters, (B, K, N), 0.0 or 1.0."""
    nearest = jnp.take_along_axis(distances, medoids[:, :, None], 1).argmin(1)
    return jax.nn.one_hot(nearest, medoids.shape[1], axis=1)


def cluster_superpixels_masked(
    tokens: jax.Array, grid: tuple[int, int], clusters: tuple[int, int]
) -> jax.Array:
    """Clusters superpixels with N x S weights and a mask: (B, N, C) -> (B, S, C)."""
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

    return lax.fori_loop(0, ROUNDS, move, centers).astype(tokens.dtype)


def reconstruct_by_top_k(tokens: jax.Array, centers: jax.Array, refined: jax.Array) -> jax.Array:
    """Reconstructs tokens by `lax.top_k`: (B, N, C), (B, S, C), (B, S, C) -> (B, N, C)."""
    x, keys = tokens.astype(jnp.float32), centers.astype(jnp.float32)
    square = jnp.sum(x**2, -1)[..., None] + jnp.sum(keys**2, -1)[:, None]
    distances = square - 2 * jnp.einsum("bnc,bsc->bns", x, keys)
    logits, index = lax.top_k(-distances / 50.0, min(20, keys.shape[1]))
    nearest = jax.vmap(lambda values, at: values[at])(refined, index)  # (B, N, k, C)
    return jnp.einsum("bnk,bnkc->bnc", jax.nn.softmax(logits, -1).astype(refined.dtype), nearest)


def roi_align_static(
    maps: tuple[jax.Array, ...],
    strides: tuple[int, ...],
    boxes: jax.Array,
    *,
    size: int,
    samples: int,
) -> jax.Array:
    """Computes RoIAlign with as many turns for all regions: (B, h, w, C), (B, R, 4) -> features.

    A bin has as many samples along an axis as it has cells, at most ``samples``.
    """
    cells = [x.shape[1] * x.shape[2] for x in maps]
    flat = jnp.concatenate([x.reshape(len(x), -1, x.shape[-1]) for x in maps], 1)
    sides = boxes[..., 2:] - boxes[..., :2]
    level = jnp.log2(jnp.sqrt(sides.prod(-1)) / 56 + 1e-6)
    level = jnp.clip(jnp.floor(level), 0, len(maps) - 1).astype(jnp.int32)
    first = jnp.array([sum(cells[:i]) for i in range(len(maps))])[level]
    shape = jnp.array([x.shape[1:3] for x in maps])[level]  # (B, R, 2)
    stride = jnp.array(strides, jnp.float32)[level][..., None]
    start, bins = boxes[..., 1::-1] / stride - 0.5, sides[..., ::-1] / stride / size
    number = jnp.maximum(jnp.ceil(bins), 1)

    def positions(i):
        """Returns places (B, R, size) of sample i of the bins along both axes."""
        at = jnp.arange(size)[:, None] + (i + 0.5) / number[:, :, None]
        return start[:, :, None] + at * bins[:, :, None]

    def turn(total, place):
        y, x = positions(place[0])[..., 0], positions(place[1])[..., 1]
        height, width = shape[..., :1], shape[..., 1:]
        near_rows, near_columns = (y >= -1) & (y <= height), (x >= -1) & (x <= width)
        counts = (place < number).all(-1)[..., None, None]
        counts &= near_rows[..., None] & near_columns[:, :, None]
        y, x = jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)
        for row in (jnp.floor(y), jnp.ceil(y)):
            for column in (jnp.floor(x), jnp.ceil(x)):
                weight = _share(y, row)[..., None] * _share(x, column)[:, :, None]
                index = row[..., None] * width[..., None] + column[:, :, None]
                index = first[..., None, None] + index.astype(jnp.int32)
                values = jax.vmap(lambda cells, index: cells[index])(flat, index)
                total += jnp.where(counts, weight, 0)[..., None] * values
        return total, None

    places = jnp.stack(jnp.meshgrid(*[jnp.arange(samples)] * 2), -1).reshape(-1, 2)
    zeros = jnp.zeros((*boxes.shape[:2], size, size, flat.shape[-1]), jnp.float32)
    total = lax.scan(turn, zeros, places)[0]
    return (total / number.prod(-1)[..., None, None, None]).astype(maps[0].dtype)


def _share(position, cell):
    """Returns the bilinear weight of a cell; of a position in a cell's centre, floor = ceil."""
    return jnp.where(position == jnp.floor(position), 0.5, 1 - abs(position - cell))


def nms_by_rows(boxes: jax.Array, scores: jax.Array, threshold: float) -> jax.Array:
    """Suppresses box by box by rows of the matrix of all pairs: (n, 4), (n,) -> (n,) bool."""
    order = jnp.argsort(-scores, stable=True)
    suppresses = ops.box_iou(boxes[order][:, None], boxes[order]) > threshold
    later = ~jnp.tri(len(scores), dtype=bool)

    def visit(i, kept):
        return kept & ~(kept[i] & suppresses[i] & later[i])

    kept = lax.fori_loop(0, len(scores), visit, jnp.ones(len(scores), bool))
    return jnp.zeros_like(kept).at[order].set(kept)


def select_by_nms(
    boxes: jax.Array, scores: jax.Array, *, score_threshold: float, iou_threshold: float, num: int
) -> jax.Array:
    """Suppresses in all classes, then selects: (n, K, 4), (n, K) -> (num,), row K + class."""

    def keep(boxes, scores):
        return ops.nms(boxes, scores, iou_threshold, valid=scores > score_threshold)

    kept = jax.vmap(keep, (1, 1), 1)(boxes, scores)
    values, places = lax.top_k(jnp.where(kept, scores, -1.0).ravel(), num)
    return jnp.where(values >= 0, places, -1)


def select_by_soft_nms(
    boxes: jax.Array, scores: jax.Array, *, score_threshold: float, iou_threshold: float, num: int
) -> jax.Array:
    """Decays the scores of all classes to the end, then selects; see :func:`select_by_nms`."""

    def decay(boxes, scores):
        def turn(carry):
            left, final = carry
            row = jnp.argmax(left)
            iou = ops.box_iou(boxes[row], boxes)
            decayed = jnp.where(iou >= iou_threshold, left * (1 - iou), left)
            decayed = jnp.where(decayed > score_threshold, decayed, -1.0)
            return decayed.at[row].set(-1.0), final.at[row].set(left[row])

        left = jnp.where(scores > score_threshold, scores, -1.0)
        some = lambda carry: (carry[0] >= 0).any()  # noqa: E731
        return lax.while_loop(some, turn, (left, jnp.full_like(left, -1.0)))[1]

    values, places = lax.top_k(jax.vmap(decay, (1, 1), 1)(boxes, scores).ravel(), num)
    return jnp.where(values >= 0, places, -1)


def match_by_matrix(
    anchors: jax.Array, boxes: jax.Array, *, positive: float, negative: float, least: float
) -> jax.Array:
    """Matches by the IoUs of all objects and anchors at once: (A, 4), (M, 4) -> (A,)."""
    iou = ops.box_iou(boxes[:, None], anchors)
    best, largest = iou.max(0), iou.max(1, keepdims=True)
    matches = jnp.where(best < negative, -1, -2)
    matches = jnp.where(best >= positive, iou.argmax(0), matches)
    takes = (iou == largest) & (largest >= least)
    last = len(boxes) - 1 - jnp.argmax(takes[::-1], 0)
    return jnp.where(takes.any(0), last, matches).astype(jnp.int32)
