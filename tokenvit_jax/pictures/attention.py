"""Draws the attention of a plain host over an image: the heads of a block, and the rollout."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.vit import ViTSettings
from tokenvit_jax.pictures.draw import show_image

_COLUMNS = 4  # panels side by side


def draw(
    image: np.ndarray,
    blocks: Sequence[np.ndarray],
    settings: ViTSettings,
    by_class_token: bool,
    caption: str,
) -> dict[str, Figure]:
    """Returns the pictures of an image's attention by name.

    Args:
      image: (H, W, 3) uint8, the image as the model saw it.
      blocks: attention of every block (heads, T, T).
      settings: architecture of the model.
      by_class_token: whether to show the attention of the class token; if not, the mean attention
        of all patches.
      caption: title of the image.

    Returns:
      "attention", the heads of the last block, and "rollout".

    Raises:
      UserError: the blocks attend among other tokens than the patches.
    """
    grid = settings.grid(*image.shape[:2])
    tokens = settings.num_front + grid[0] * grid[1]
    sizes = sorted({block.shape[-1] for block in blocks})
    if sizes != [tokens]:
        raise UserError(
            f"blocks attend among {' and '.join(map(str, sizes))} tokens instead of {tokens}; "
            "valid: a model without expedite and token_reducer"
        )
    stacked = np.stack(blocks)[None]
    rollout = np.asarray(ops.attention_rollout(stacked))[0]
    heads = to_patches(blocks[-1], settings.num_front, grid, by_class_token)
    combined = to_patches(rollout, settings.num_front, grid, by_class_token)
    side, names = settings.patch_size, [f"head {number}" for number in range(len(heads))]
    title = f"rollout of {len(blocks)} blocks"
    return {
        "attention": plot_maps(image, heads, side, names, caption),
        "rollout": plot_maps(image, combined[None], side, [title], caption),
    }


def to_patches(
    weights: np.ndarray, num_front: int, grid: tuple[int, int], by_class_token: bool
) -> np.ndarray:
    """Returns the attention to each patch, in units of equal attention to all tokens.

    Args:
      weights: (..., T, T), rows are queries and sum to 1.
      num_front: number of tokens in front of the patches.
      grid: rows and columns of patches.
      by_class_token: whether the query is the class token; if not, the mean over all patches.

    Returns:
      (..., rows, columns).
    """
    queries = weights[..., 0, :] if by_class_token else weights[..., num_front:, :].mean(-2)
    patches = queries[..., num_front:] * weights.shape[-1]
    return patches.reshape(*patches.shape[:-1], *grid)


def plot_maps(
    image: np.ndarray, maps: np.ndarray, patch_size: int, names: Sequence[str], caption: str
) -> Figure:
    """Draws an image, and maps of attention over it, all with the same colour scale.

    Args:
      image: (H, W, 3) uint8.
      maps: results of :func:`to_patches` (n, rows, columns).
      patch_size: side of a patch [pixels]; the last ones may reach beyond the image.
      names: titles of the maps.
      caption: title of the image.
    """
    columns = min(1 + len(maps), _COLUMNS)
    rows = -(-(1 + len(maps)) // columns)
    aspect = image.shape[1] / image.shape[0]
    figure = Figure(figsize=(1.9 * aspect * columns + 0.9, 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[1 + len(maps) :]:
        axis.axis("off")
    show_image(axes[0], image)
    axes[0].set_title(caption, fontsize=8, parse_math=False)  # a name may have dollar signs
    grey = image.mean(-1)
    for axis, values, name in zip(axes[1:], maps, names, strict=False):
        axis.imshow(grey, cmap="gray", interpolation="nearest")
        shown = values.repeat(patch_size, 0).repeat(patch_size, 1)[: len(grey), : grey.shape[1]]
        drawn = axis.imshow(
            shown, cmap="inferno", alpha=0.7, vmin=0, vmax=maps.max(),
            interpolation="nearest",
        )  # fmt: skip
        axis.set(xticks=(), yticks=())
        axis.spines[:].set_visible(False)
        axis.set_title(name, fontsize=8)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.9, aspect=30)
    bar.set_label("attention (1: equal to all tokens)", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return figure
