"""Draws groups of tokens: query groups, clusters and superpixels."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tokenvit_jax import ops
from tokenvit_jax.models.vit import VisionTransformer
from tokenvit_jax.pictures.draw import (
    COLORS,
    color_labels,
    distinct_colors,
    panel_aspect,
    pixels_of,
    show_image,
    tint,
    write_title,
)


class Routing(NamedTuple):
    """Dynamic groups of one block.

    Attributes:
      groups: query group of each token, (B, N, L) int.
      keys: keys that each group selects, (B, N, G, k) int.
      grid: rows and columns of tokens.
    """

    groups: np.ndarray
    keys: np.ndarray
    grid: tuple[int, int]


class Clustering(NamedTuple):
    """Clusters of one block.

    Attributes:
      assignment: cluster of each token, (B, N) int.
      grid: rows and columns of tokens.
    """

    assignment: np.ndarray
    grid: tuple[int, int]


def finest_routing(intermediates: Mapping[str, Any], image_size: tuple[int, int]) -> Routing | None:
    """Returns the groups of the last block on the finest map whose groups select only some keys.

    Args:
      intermediates: the collection "intermediates" of `model.apply`, with the "groups" and "keys"
        of :class:`tokenvit_jax.layers.DynamicGroupAttention`.
      image_size: height and width of the images [pixels].

    Returns:
      The routing, or None if no block has dynamic groups or all blocks attend to every key.
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
      image_size: height and width of the images [pixels].
    """
    flat = flatten_dict(intermediates)
    paths = sorted((path for path in flat if path[-1] == "clusters0"), key=_natural_order)
    # Later blocks of a stage overwrite earlier ones.
    last = {flat[path][0].shape[-1]: np.asarray(flat[path][0]) for path in paths}
    return [Clustering(last[n], _grid(n, image_size)) for n in sorted(last, reverse=True)]


def _grid(num_tokens, image_size):
    """Returns rows and columns of tokens: the sides of the image over the stride, rounded up."""
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
    """Draws query groups and the keys that each group selects.

    Each image has two rows of panels: its largest query groups, and below each group its keys.

    Args:
      images: (B, H, W, 3) uint8.
      routing: groups of these images.
      captions: one caption per image.
      head: attention head whose groups are drawn.
      num_groups: number of the largest groups to draw, at most 6.

    References:
      Liu et al. 2022, "Dynamic Group Transformer", Figure 3.
    """
    num_images, height, width = images.shape[:3]
    aspect = width / height
    # All lengths are in inches; the image on the left is as high as two panels and a title.
    panel, title, gap = 1.4, 0.24, 0.2
    row_height, whole = 2 * (panel + title) + gap, 2 * panel + title
    column_width = panel * aspect + gap
    size = (whole * aspect + num_groups * column_width + gap, num_images * row_height)
    figure = Figure(figsize=size)

    def add_panel(pixels, text, left, bottom, side):
        position = (left / size[0], bottom / size[1], side * aspect / size[0], side / size[1])
        axis = figure.add_axes(position)
        show_image(axis, pixels)
        write_title(axis, text, side * aspect)

    rows = zip(images, routing.groups[:, head], routing.keys[:, head], captions, strict=True)
    for row, (image, groups, keys, caption) in enumerate(rows):
        bottom = size[1] - (row + 1) * row_height + gap / 2
        add_panel(image, caption, gap / 2, bottom, whole)
        pairs = zip(_largest_groups(groups, num_groups), COLORS, strict=False)
        for column, (group, color) in enumerate(pairs):
            members = np.flatnonzero(groups == group)
            left = whole * aspect + gap + column * column_width
            queries = tint(image, members, routing.grid, color)
            selected = tint(image, keys[group], routing.grid, color)
            add_panel(queries, f"{len(members)} queries", left, bottom + panel + title, panel)
            add_panel(selected, f"their {keys.shape[1]} keys", left, bottom, panel)
            frame = (panel * aspect + gap / 2, 2 * (panel + title) + gap / 4)
            _frame(figure, (left - gap / 4, bottom - gap / 4), frame, color)
    return figure


def plot_clusters(
    image: np.ndarray, clusterings: Sequence[Clustering], caption: str, *, num_clusters: int = 5
) -> Figure:
    """Draws the clusters of an image's tokens.

    Each clustering has one row: all clusters as coloured regions, then the tokens of the largest
    clusters one by one, in their colours.

    Args:
      image: (H, W, 3) uint8.
      clusterings: clusters of this image alone, (1, N).
      caption: title of the first row.
      num_clusters: number of the largest clusters to draw one by one.

    References:
      Xie et al. 2022, "ClusTR", Figure A3.
    """
    by_size = [_clusters_by_size(assignment[0]) for assignment, _ in clusterings]
    columns = 2 + min(max(map(len, by_size)), num_clusters)
    width = 1.6 * panel_aspect(image)
    figure = Figure(figsize=(width * columns, 2 * len(clusterings)), layout="constrained")
    rows = figure.subplots(len(clusterings), columns, squeeze=False)
    for row, (axes, clusters, (assignment, grid)) in enumerate(
        zip(rows, by_size, clusterings, strict=True)
    ):
        show_image(axes[0], image)
        write_title(axes[0], "" if row else caption, width)
        show_image(axes[1], color_regions(image, assignment[0], grid))
        axes[1].set_title(f"{grid[0]} x {grid[1]} tokens\n{len(clusters)} clusters", fontsize=8)
        for axis in axes[2 + len(clusters) :]:
            axis.axis("off")
        colors = distinct_colors(assignment.max() + 1) / 255
        for axis, (number, members) in zip(axes[2:], clusters, strict=False):
            show_image(axis, tint(image, members, grid, colors[number]))
            axis.set_title(f"{len(members)} tokens", fontsize=8)
    return figure


def _clusters_by_size(assignment):
    """Returns the number and the tokens of each non-empty cluster, the largest cluster first."""
    clusters, sizes = np.unique(assignment, return_counts=True)
    by_size = clusters[np.argsort(-sizes, kind="stable")]
    return [(number, np.flatnonzero(assignment == number)) for number in by_size]


def color_regions(image: np.ndarray, assignment: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Colours an image by the clusters of its tokens.

    Args:
      image: (H, W, 3) uint8.
      assignment: cluster of each token, (N,) int, row by row.
      grid: rows and columns of tokens.

    Returns:
      (H, W, 3) uint8.
    """
    clusters = pixels_of(assignment.reshape(grid), image.shape[:2])
    return color_labels(image, clusters, assignment.max() + 1)


def superpixels(model: nn.Module, variables: Any, images: jax.Array) -> Clustering | None:
    """Returns the nearest superpixel of each patch of an expedited plain host.

    Args:
      model: backbone; its setting `expedite` defines the superpixels.
      variables: variables of the backbone.
      images: (B, H, W, 3), normalised.

    Returns:
      The clustering, or None if the model clusters no patches.
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


def plot_superpixels(
    image: np.ndarray,
    clustering: Clustering,
    caption: str,
    padded_size: tuple[int, int] | None = None,
) -> Figure:
    """Draws the borders of superpixels over an image and, next to it, their mean colours.

    Args:
      image: (H, W, 3) uint8, without padding.
      clustering: superpixels of this image alone, (1, N).
      caption: title of the image.
      padded_size: height and width that the patches cover, if the model saw the image at the top
        left of a larger one [pixels].
    """
    (assignment,), grid = clustering
    size, padded_size = image.shape[:2], padded_size or image.shape[:2]
    panel = 3.2 * panel_aspect(image)
    figure = Figure(figsize=(2 * panel + 0.2, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    show_image(left, image)
    write_title(left, caption, panel)
    patch = np.array(padded_size) / grid  # height and width
    rows, columns = np.ceil(size / patch).astype(int)
    regions = assignment.reshape(grid)
    borders = _borders(regions[:rows, :columns]) * patch[::-1] - 0.5  # pixels begin at -1/2
    lines = LineCollection(borders, colors="white", linewidths=0.7)
    left.add_collection(lines, autolim=False)
    shown = pixels_of(regions, padded_size)[: size[0], : size[1]]
    show_image(right, _mean_colors(image, shown))
    count = len(np.unique(shown))
    write_title(right, f"{rows} x {columns} patches, {count} superpixels", panel)
    return figure


def _borders(regions):
    """Returns the lines between different neighbours: (n, 2, 2), x and y of both ends [cells]."""
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


def _natural_order(path: tuple[str, ...]) -> list[int]:
    """Returns a key that sorts stages_2_10 after stages_2_9."""
    return [int(number) for name in path for number in re.findall(r"\d+", name)]


def _largest_groups(groups, num_groups):
    return np.argsort(-np.bincount(groups), kind="stable")[:num_groups]


def _frame(figure, corner, size, color):
    """Draws a dashed box around the panels of one group.

    Args:
      figure: the figure.
      corner: left and bottom [inches].
      size: width and height [inches].
      color: "#RRGGBB".
    """
    box = Rectangle(
        corner, *size, fill=False, color=color, linestyle="--", transform=figure.dpi_scale_trans
    )
    figure.add_artist(box)
