"""Pictures of what a model does: classes, label maps, groups, clusters, superpixels, curves.

Every function that draws returns a matplotlib Figure and has no other effect; `figure.savefig`
writes it.
"""

import colorsys
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.vit import VisionTransformer

# Okabe and Ito 2008: distinguishable with any colour vision, on photographs too.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class Routing(NamedTuple):
    """Of one block: query groups (B, N, L), keys of each group (B, N, G, k), its tokens' (H, W)."""

    groups: np.ndarray
    keys: np.ndarray
    grid: tuple[int, int]


class Clustering(NamedTuple):
    """Of one block: the cluster of each token, (B, N) int, and its tokens' (H, W)."""

    assignment: np.ndarray
    grid: tuple[int, int]


def finest_routing(intermediates: Mapping[str, Any], image_size: tuple[int, int]) -> Routing | None:
    """Returns the groups of the last block with the finest tokens whose groups select.

    Args:
        intermediates: the collection "intermediates" of `model.apply`, with the "groups" and "keys"
            of :class:`tokenvit_jax.layers.DynamicGroupAttention`.
        image_size: height and width of the images, pixels.

    Returns:
        The routing, or None where no block has dynamic groups or all of them attend to every key.
    """
    flat = flatten_dict(intermediates)
    found = [
        (groups[0].shape[-1], _natural_order(path), np.asarray(groups[0]), np.asarray(keys[0]))
        for path, groups in flat.items()
        if path[-1] == "groups"
        for keys in [flat[(*path[:-1], "keys")]]
        if keys[0].shape[-1] < groups[0].shape[-1]
    ]
    if not found:
        return None
    length, _, groups, keys = max(found, key=lambda block: block[:2])
    return Routing(groups, keys, _grid(length, image_size))


def stage_clusterings(
    intermediates: Mapping[str, Any], image_size: tuple[int, int]
) -> list[Clustering]:
    """Returns the coarse clusters of the last block of each clustering stage, finest tokens first.

    Args:
        intermediates: the collection "intermediates" of `model.apply`, with the "clusters0" of
            :class:`tokenvit_jax.layers.ClusterAttention`.
        image_size: height and width of the images, pixels.
    """
    flat = flatten_dict(intermediates)
    paths = sorted((path for path in flat if path[-1] == "clusters0"), key=_natural_order)
    # Later blocks of a stage overwrite earlier ones.
    last = {flat[path][0].shape[-1]: np.asarray(flat[path][0]) for path in paths}
    return [Clustering(last[n], _grid(n, image_size)) for n in sorted(last, reverse=True)]


def _grid(num_tokens, image_size):
    """Rows and columns of a stage's tokens: the image's sides over its stride, rounded up."""
    sides = [[-(-side // stride) for side in image_size] for stride in (4, 8, 16, 32)]
    return next((height, width) for height, width in sides if height * width == num_tokens)


def plot_groups(
    images: np.ndarray,
    routing: Routing,
    captions: Sequence[str],
    *,
    head: int = 0,
    num_groups: int = 4,
) -> Figure:
    """Draws query groups and the keys that each selects, as Figure 3 of the DGT paper does.

    For each image two rows of panels: the largest query groups, and below each its keys.

    Args:
        images: (B, H, W, 3) uint8.
        routing: of the same images.
        captions: one per image.
        head: whose groups.
        num_groups: how many of the largest groups, at most 6.
    """
    num_images, height, width = images.shape[:3]
    aspect = width / height
    # Everything in inches; an image takes two panels and a title on the left.
    panel, title, gap = 1.4, 0.24, 0.2
    row_height, whole = 2 * (panel + title) + gap, 2 * panel + title
    column_width = panel * aspect + gap
    size = (whole * aspect + num_groups * column_width + gap, num_images * row_height)
    figure = Figure(figsize=size)

    def show(pixels, text, left, bottom, side):
        position = (left / size[0], bottom / size[1], side * aspect / size[0], side / size[1])
        axis = figure.add_axes(position)
        _show(axis, pixels)
        axis.set_title(text, fontsize=8, pad=3)

    rows = zip(images, routing.groups[:, head], routing.keys[:, head], captions, strict=True)
    for row, (image, groups, keys, caption) in enumerate(rows):
        bottom = size[1] - (row + 1) * row_height + gap / 2
        show(image, caption, gap / 2, bottom, whole)
        pairs = zip(_largest_groups(groups, num_groups), COLORS, strict=False)
        for column, (group, color) in enumerate(pairs):
            members = np.flatnonzero(groups == group)
            left = whole * aspect + gap + column * column_width
            queries = tint(image, members, routing.grid, color)
            selected = tint(image, keys[group], routing.grid, color)
            show(queries, f"{len(members)} queries", left, bottom + panel + title, panel)
            show(selected, f"their {keys.shape[1]} keys", left, bottom, panel)
            frame = (panel * aspect + gap / 2, 2 * (panel + title) + gap / 4)
            _frame(figure, (left - gap / 4, bottom - gap / 4), frame, color)
    return figure


def plot_clusters(
    image: np.ndarray, clusterings: Sequence[Clustering], caption: str, *, num_clusters: int = 5
) -> Figure:
    """Draws the clusters of an image's tokens, as Figure A3 of the ClusTR paper does.

    For each clustering a row: all clusters as coloured regions, then the tokens of the largest
    ones, each by itself.

    Args:
        image: (H, W, 3) uint8.
        clusterings: of this image alone, (1, N).
        caption: of the first row.
        num_clusters: how many of the largest clusters are shown by themselves.
    """
    by_size = [_clusters_by_size(assignment[0]) for assignment, _ in clusterings]
    columns = 2 + min(max(map(len, by_size)), num_clusters)
    aspect = image.shape[1] / image.shape[0]
    figure = Figure(figsize=(1.6 * aspect * columns, 1.85 * len(clusterings)), layout="constrained")
    rows = figure.subplots(len(clusterings), columns, squeeze=False)
    for row, (axes, clusters, (assignment, grid)) in enumerate(
        zip(rows, by_size, clusterings, strict=True)
    ):
        _show(axes[0], image)
        axes[0].set_title("" if row else caption, fontsize=8)
        _show(axes[1], color_regions(image, assignment[0], grid))
        axes[1].set_title(f"{grid[0]} x {grid[1]} tokens, {len(clusters)} clusters", fontsize=8)
        for axis in axes[2 + len(clusters) :]:
            axis.axis("off")
        for axis, members in zip(axes[2:], clusters, strict=False):
            _show(axis, tint(image, members, grid, COLORS[0]))
            axis.set_title(f"{len(members)} tokens", fontsize=8)
    return figure


def _clusters_by_size(assignment):
    """Returns the tokens of each cluster that has some, the largest cluster first."""
    clusters, sizes = np.unique(assignment, return_counts=True)
    return [np.flatnonzero(assignment == c) for c in clusters[np.argsort(-sizes, kind="stable")]]


def color_regions(image: np.ndarray, assignment: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Colours an image by the clusters of its tokens.

    Args:
        image: (H, W, 3) uint8.
        assignment: (N,) int, cluster of each token, row by row.
        grid: rows and columns of tokens.

    Returns:
        (H, W, 3) uint8.
    """
    clusters = _pixels_of(assignment.reshape(grid), image.shape[:2])
    return color_labels(image, clusters, assignment.max() + 1)


def color_labels(image: np.ndarray, labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Colours the pixels of an image by their labels.

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) int, in [0, num_labels).
        num_labels: how many there may be.

    Returns:
        (H, W, 3) uint8.
    """
    grey = image.mean(-1, keepdims=True)
    return (0.45 * grey + 0.55 * distinct_colors(num_labels)[labels]).astype(np.uint8)


def distinct_colors(count: int) -> np.ndarray:
    """Returns colours (count, 3) uint8, of which neighbours in number are far apart."""
    # Hues apart by the golden section, from blue: the first label is often the background.
    colors = [
        colorsys.hsv_to_rgb((0.6 + 0.61803399 * i) % 1, 0.85, 0.6 + 0.4 * (i % 2))
        for i in range(count)
    ]
    return (255 * np.array(colors)).round().astype(np.uint8)


def _pixels_of(tokens: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns for each pixel of an image the entry of the token that it belongs to."""
    rows, columns = (
        np.arange(side) * count // side for side, count in zip(size, tokens.shape, strict=True)
    )
    return tokens[rows[:, None], columns]


def superpixels(model: nn.Module, variables: Any, images: jax.Array) -> Clustering | None:
    """Returns which superpixel each patch of a plain host is nearest to, where they are clustered.

    Args:
        model: the host; what is asked for is what its `expedite` does.
        variables: of the model.
        images: (B, H, W, 3), normalised.

    Returns:
        The clustering, or None for a model that has none of patches.
    """
    expedite = model.settings.expedite if isinstance(model, VisionTransformer) else None
    if not expedite or not expedite.alpha:
        return None
    before = model.clone(expedite=None, depth=expedite.alpha)
    tokens = before.apply(variables, images, False, method="tokens")[:, model.settings.num_front :]
    grid = model.settings.grid(*images.shape[1:3])
    centers = expedite.cluster(tokens, grid)
    numbers = jnp.broadcast_to(jnp.arange(float(centers.shape[1])), centers.shape[:2])
    nearest = ops.reconstruct_tokens(tokens, centers, numbers[..., None], mode="hard")
    return Clustering(nearest[..., 0].astype(jnp.int32), grid)


def plot_superpixels(image: np.ndarray, clustering: Clustering, caption: str) -> Figure:
    """Draws the borders of superpixels over an image, and beside it their mean colours.

    Args:
        image: (H, W, 3) uint8.
        clustering: of this image alone, (1, N).
        caption: names the image.
    """
    (assignment,), (rows, columns) = clustering
    height, width = image.shape[:2]
    figure = Figure(figsize=(6.4 * width / height + 0.2, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _show(left, image)
    left.set_title(caption, fontsize=8)
    regions = assignment.reshape(rows, columns)
    scale = np.array([width / columns, height / rows])
    borders = _borders(regions) * scale - 0.5  # pixels begin at -1/2
    left.add_collection(LineCollection(borders, colors="white", linewidths=0.7))
    _show(
        right, _mean_colors(image, _pixels_of(assignment.reshape(rows, columns), (height, width)))
    )
    count = len(np.unique(assignment))
    right.set_title(f"{rows} x {columns} patches, {count} superpixels", fontsize=8)
    return figure


def _borders(regions):
    """Returns the lines (n, 2, 2) between unlike neighbours, x and y of both ends, in cells."""
    lines = []
    y, x = np.nonzero(regions[:, 1:] != regions[:, :-1])
    lines.append(np.stack([np.stack([x + 1, y], -1), np.stack([x + 1, y + 1], -1)], 1))
    y, x = np.nonzero(regions[1:] != regions[:-1])
    lines.append(np.stack([np.stack([x, y + 1], -1), np.stack([x + 1, y + 1], -1)], 1))
    return np.concatenate(lines)


def _mean_colors(image, regions):
    flat = regions.ravel()
    sums = [np.bincount(flat, channel.ravel()) for channel in np.moveaxis(image, -1, 0)]
    means = np.stack(sums, -1) / np.maximum(np.bincount(flat), 1)[:, None]
    return means[regions].astype(np.uint8)


def class_shares(labels: np.ndarray) -> list[tuple[int, float]]:
    """Returns the labels that occur, each with its part of the pixels, in falling order."""
    found, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(found[i]), float(counts[i] / labels.size)) for i in order]


def plot_segmentation(image: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Figure:
    """Draws an image, its label map over it, and which class has which part of the pixels.

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) int.
        names: of all classes.
    """
    shares = class_shares(labels)
    columns = -(-len(shares) // 14)  # as many names below each other as there is room for
    panel = 3.2 * image.shape[1] / image.shape[0]
    size = (2 * panel + 0.2 + 1.9 * columns, 3.2)
    figure = Figure(figsize=size, layout="constrained")
    widths = (panel, panel, 1.9 * columns)
    image_axis, label_axis, legend_axis = figure.subplots(1, 3, width_ratios=widths)
    _show(image_axis, image)
    _show(label_axis, color_labels(image, labels, len(names)))
    colors = distinct_colors(len(names)) / 255
    legend_axis.axis("off")
    legend_axis.legend(
        handles=[
            Patch(color=colors[label], label=f"{names[label]}: {share:.1%}")
            for label, share in shares
        ],
        loc="center left", ncols=columns, fontsize=8, frameon=False,
    )  # fmt: skip
    return figure


def label_image(labels: np.ndarray, num_classes: int) -> Image.Image:
    """Returns a label map (H, W) as an image whose pixels are the labels, with a palette."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(distinct_colors(num_classes).tobytes())
    return image


def plot_classes(image: np.ndarray, classes: Sequence[tuple[str, float]]) -> Figure:
    """Draws an image and bars of its most probable classes.

    Args:
        image: (H, W, 3) uint8.
        classes: names and probabilities, the most probable first.
    """
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    image_axis, bar_axis = figure.subplots(1, 2, width_ratios=(1, 1.5))
    _show(image_axis, image)
    names, probabilities = zip(*classes, strict=True)
    places = range(len(names), 0, -1)
    colors = [COLORS[1], *("0.75" for _ in names[1:])]
    bars = bar_axis.barh(places, probabilities, height=0.7, color=colors)
    bar_axis.bar_label(bars, [f"{p:.1%}" for p in probabilities], padding=3, fontsize=9)
    bar_axis.set_yticks(places, names)
    bar_axis.tick_params(axis="y", length=0)
    bar_axis.set(xlim=(0, 1.15), xticks=())
    bar_axis.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def plot_learning_curve(records: Sequence[Mapping[str, float]]) -> Figure:
    """Draws the training loss and the accuracy of evaluations over steps, if they were logged.

    Args:
        records: objects of a run's `metrics.jsonl`: "step" with "loss" or "eval/accuracy".

    Raises:
        UserError: neither was logged.
    """
    curves = [
        ("training loss", COLORS[0], [(r["step"], r["loss"]) for r in records if "loss" in r]),
        (
            "evaluation accuracy, %",
            COLORS[1],
            [(r["step"], 100 * r["eval/accuracy"]) for r in records if "eval/accuracy" in r],
        ),
    ]
    curves = [curve for curve in curves if curve[2]]
    if not curves:
        raise UserError("no learning curve: neither 'loss' nor 'eval/accuracy' was logged")
    figure = Figure(figsize=(4 * len(curves), 3), layout="constrained")
    axes = figure.subplots(1, len(curves), sharex=True, squeeze=False)[0]
    for axis, (title, color, points) in zip(axes, curves, strict=True):
        axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3)
        axis.set_title(f"{title} (last: {points[-1][1]:.3g})", fontsize=10)
        axis.set(xlabel="step", xlim=(0, None))
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _natural_order(path: tuple[str, ...]) -> list[int]:
    """Sorts stages_2_10 after stages_2_9."""
    return [int(number) for name in path for number in re.findall(r"\d+", name)]


def _largest_groups(groups, num_groups):
    return np.argsort(-np.bincount(groups), kind="stable")[:num_groups]


def tint(image: np.ndarray, tokens: np.ndarray, grid: tuple[int, int], color: str) -> np.ndarray:
    """Colours some tokens of an image and fades the others.

    Args:
        image: (H, W, 3) uint8.
        tokens: indices of tokens, row by row.
        grid: rows and columns of tokens.
        color: "#RRGGBB".

    Returns:
        (H, W, 3) uint8.
    """
    chosen = np.zeros(grid, bool)
    chosen.flat[tokens] = True
    mask = _pixels_of(chosen, image.shape[:2])[..., None]
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    grey = image.mean(-1, keepdims=True)
    return np.where(mask, 0.3 * grey + 0.7 * rgb, 0.5 * grey + 0.5 * 255).astype(np.uint8)


def _show(axis: Axes, image: np.ndarray) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=(), yticks=())
    axis.spines[:].set_visible(False)


def _frame(figure, corner, size, color):
    """Draws a dashed box, in inches, around the panels of one group."""
    box = Rectangle(
        corner, *size, fill=False, color=color, linestyle="--", transform=figure.dpi_scale_trans
    )
    figure.add_artist(box)
