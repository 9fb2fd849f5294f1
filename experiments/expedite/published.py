"""Costs that Expedite (Liang et al. 2022) reports, and the rules by which its authors count them.

The authors count with three programs, one for each network that they expedite. A multiply-add
counts as one, and all three programs count the products of an encoder's blocks. The programs differ
in the operations that they add, here a :class:`Counter`, and in how they count clustering and
reconstruction:

  * Segmenter: each kind of module has a formula. Work outside modules is not counted, namely the
    decoder's products of q, k and v and its projections of patches and classes. The clustering
    counts a window for every token, although the released code computes distances to all centres.
  * SWAG: all operations of the traced graph are counted, including most elementwise ones. The
    clustering counts all centres for every token.
  * DPT: the operations of the traced graph are counted, but few elementwise ones. `einsum`, the
    distances of both layers and the sum of the reconstruction are not counted.

A traced graph holds only operations that the result needs, hence not the hard assignment at the end
of the clustering.
"""

import math
from typing import NamedTuple

from tokenvit_jax.models.registry import create_model
from tokenvit_jax.models.vit import ViTSettings

# Temperature of the authors' Segmenter in all published settings. It does not change the cost.
TEMPERATURE = 50.0


class ExpediteCost(NamedTuple):
    """A cost that the authors report, and its setting.

    Attributes:
      network: "segmenter" | "swag" | "dpt".
      name: name of the row.
      model: name of the encoder.
      image_size: height and width [pixels].
      patch_size: side of a patch [pixels]; 16 for the convolutional stem of DPT.
      classes: number of classes of the head.
      reported: 10^9 multiply-adds; for DPT, twice the 10^9 multiply-adds that are saved. None: the
        authors do not report the cost.
      source: paper and table, or the released code.
      clusters: rows and columns of the centres; None without clustering.
      alpha: number of blocks on all tokens before the clustering.
      window: see :class:`tokenvit_jax.models.expedite.Expedite`, also for the next two attributes.
      iterations: number of rounds of clustering.
      neighbors: number of nearest centres in the reconstruction.
      decoder_layers: number of blocks of Segmenter's mask transformer.
      where: what is reconstructed, the output of "blocks" or the "logits" of the head; None:
        nothing.
    """

    network: str
    name: str
    model: str
    image_size: tuple[int, int]
    patch_size: int
    classes: int
    reported: float | None
    source: str
    clusters: tuple[int, int] | None = None
    alpha: int = 0
    window: int = 5
    iterations: int = 5
    neighbors: int = 20
    decoder_layers: int = 0
    where: str | None = None


class Counter(NamedTuple):
    """Operations that a program adds to the matrix products of a block.

    Attributes:
      weights: operations per attention weight.
      elements: operations per element of the block's input.
    """

    weights: int
    elements: int


# Softmax; two LN, GELU of the hidden layer, which is four times wider, scale of q.
SEGMENTER_COUNTER = Counter(weights=2, elements=2 * 2 + 4 * 2 + 1)
# Softmax; two LN, GELU, scale of q, biases, two sums, dropouts of hidden layer and outputs.
SWAG_COUNTER = Counter(weights=5, elements=2 * 4 + 4 + 1 + 9 + 2 + 6)
# Scale of the weights; two LN.
DPT_COUNTER = Counter(weights=1, elements=2)


def counted(cost: ExpediteCost) -> float:
    """Counts the cost of a setting by the authors' rules, in the units of `ExpediteCost.reported`.

    Args:
      cost: an entry of :data:`EXPEDITE`, or a similar one.
    """
    return {"segmenter": segmenter_gmacs, "swag": swag_gmacs, "dpt": dpt_saving}[cost.network](cost)


def segmenter_gmacs(cost: ExpediteCost) -> float:
    """Counts Segmenter with its mask transformer.

    The reported costs are for a decoder that runs on the centres and whose logits are
    reconstructed; logits count as if they had the width of the encoder.

    Args:
      cost: a setting with `network` "segmenter".

    Returns:
      10^9 multiply-adds of one image.

    References:
      Liang et al. 2022, Tables 2, 3 and 6.
    """
    length, centers = _lengths(cost)
    vit = create_model(cost.model).settings
    # Biases of the patches; LN.
    encoder = vit_macs(cost, SEGMENTER_COUNTER) + length * vit.dim + 2 * (centers + 1) * vit.dim
    if cost.clusters is not None:
        encoder += segmenter_clustering(cost) + segmenter_reconstruction(cost)
    patches = centers if cost.where == "logits" else length
    tokens = patches + cost.classes
    # The first projection; linear layers, GELU and LN of the blocks; LN of tokens and of logits.
    decoder = patches * vit.dim**2 + cost.decoder_layers * 12 * tokens * vit.dim * (vit.dim + 1)
    decoder += 2 * tokens * vit.dim + 2 * patches * cost.classes
    return (encoder + decoder) / 1e9


def swag_gmacs(cost: ExpediteCost) -> float:
    """Counts a SWAG classifier, whose head reads the refined centres without reconstruction.

    A dropout counts although it does nothing. With clustering there is one before every block;
    without clustering there is a single one before all blocks.

    Args:
      cost: a setting with `network` "swag".

    Returns:
      10^9 multiply-adds of one image.

    References:
      Liang et al. 2022, Figure 9.
    """
    length, centers = _lengths(cost)
    vit = create_model(cost.model).settings
    counter, macs = SWAG_COUNTER, 2 * (length + 1) * vit.dim  # positions, dropout
    if cost.clusters is not None:
        counter, macs = counter._replace(elements=counter.elements + 1), (length + 1) * vit.dim
        pairs = centers * length
        # Squares, products and sums of the distances; mask, scale, softmax; the new centres.
        one_round = (length + centers) * vit.dim + pairs * (vit.dim + 3)
        one_round += pairs * (1 + 1 + 5) + pairs * vit.dim + centers * vit.dim
        macs += cost.iterations * one_round + 3 * pairs  # and the mask once
    macs += 4 * (centers + 1) * vit.dim + cost.classes * (vit.dim + 1)  # LN, head
    return (macs + vit_macs(cost, counter)) / 1e9


def dpt_saving(cost: ExpediteCost) -> float:
    """Counts the cost that clustering saves in DPT, whose other parts do not change.

    The decoder reads the outputs of blocks 9 and 12 at 1/16 of the image size; both are
    reconstructed.

    Args:
      cost: a setting with `network` "dpt".

    Returns:
      Twice the 10^9 multiply-adds of one image, because the authors count two operations for each.

    References:
      Liang et al. 2022, Table 7.
    """
    length, centers = _lengths(cost)
    dim = create_model(cost.model).settings.dim
    everywhere = vit_macs(cost._replace(clusters=None), DPT_COUNTER)
    # Squares and two factors of the distances, the product for the new centres; pooling and mask.
    one_round = (length + centers) * dim + 2 * centers * length + centers * length * dim
    clustering = cost.iterations * one_round + centers * dim + centers * length
    # The released code also reconstructs from the class token.
    reconstruction = 2 * (centers + 1) * length + (length + centers + 1) * dim
    layers = clustering + 2 * reconstruction
    return 2 * (everywhere - vit_macs(cost, DPT_COUNTER) - layers) / 1e9


def vit_macs(cost: ExpediteCost, counter: Counter) -> int:
    """Counts the patches and the blocks of an encoder: `alpha` on all tokens, then on centres.

    Args:
      cost: the setting.
      counter: operations that count besides products; `Counter(0, 0)` for products alone.
    """
    length, centers = _lengths(cost)
    vit = create_model(cost.model).settings
    patches = length * cost.patch_size**2 * 3 * vit.dim
    before = cost.alpha * block_macs(length + 1, vit, counter)
    return patches + before + (vit.depth - cost.alpha) * block_macs(centers + 1, vit, counter)


def block_macs(tokens: int, vit: ViTSettings, counter: Counter) -> int:
    """Counts a block whose hidden layer is four times wider than its input.

    Args:
      tokens: number of tokens, including the class token.
      vit: model with the width and the number of heads.
      counter: operations that count besides products.
    """
    products = 12 * tokens * vit.dim**2 + 2 * tokens**2 * vit.dim
    weights, elements = vit.num_heads * tokens**2, tokens * vit.dim
    return products + counter.weights * weights + counter.elements * elements


def segmenter_clustering(cost: ExpediteCost) -> int:
    """Counts the clustering layer as in Segmenter.

    Every channel of every pair counts one operation each for the difference, its square and the
    weighted sum; every pair counts three for scale and softmax. Every token sees a whole window.

    Args:
      cost: a setting with clusters.
    """
    (length, centers), dim = _lengths(cost), create_model(cost.model).settings.dim
    pairs = length * min(cost.window**2, centers)
    one_round = 3 * pairs * (dim + 1) + centers * dim
    return cost.iterations * one_round + length * dim + 2 * (length + centers)


def segmenter_reconstruction(cost: ExpediteCost) -> int:
    """Counts the reconstruction layer as in Segmenter: distances to all centres, k neighbours.

    Args:
      cost: a setting with clusters.
    """
    (length, centers), dim = _lengths(cost), create_model(cost.model).settings.dim
    distances = (length + centers) * dim + length * centers * (dim + 1)
    return distances + length * min(cost.neighbors, centers) * (dim + 3)


def _lengths(cost: ExpediteCost) -> tuple[int, int]:
    """Returns the number of tokens before and after the clustering, without the class token."""
    length = math.prod(size // cost.patch_size for size in cost.image_size)
    return length, length if cost.clusters is None else math.prod(cost.clusters)


def _squares(base: ExpediteCost, source: str, *rows: tuple[int, int, float]) -> list[ExpediteCost]:
    """Returns a base with clusters, for each row of alpha, side of the map and reported cost."""
    return [
        base._replace(
            name=f"{base.name}, {side} x {side} after {alpha}",
            clusters=(side, side),
            alpha=alpha,
            reported=reported,
            source=source,
        )
        for alpha, side, reported in rows
    ]


def _with(base: ExpediteCost, field: str, reported: dict[int, float]) -> list[ExpediteCost]:
    """Returns rows of Table 2: a base with the values of one field and their reported costs."""
    return [
        base._replace(
            name=f"{base.name}, {field} {value}", reported=cost, source=_TABLE_2, **{field: value}
        )
        for value, cost in reported.items()
    ]


_TABLE_2, _TABLE_3, _TABLE_6 = (f"Liang et al. 2022, Table {table}" for table in (2, 3, 6))
_CODE = "github.com/Expedit-LargeScale-Vision-Transformer/Expedit-{}, README"
_ADE = ExpediteCost(
    network="segmenter",
    name="Segmenter ViT-L/16, ADE20K",
    model="vit_l",
    image_size=(640, 640),
    patch_size=16,
    classes=150,
    reported=659.0,
    source=_TABLE_3,
    decoder_layers=2,
)
_ADE_SMALL = _ADE._replace(
    name="Segmenter ViT-B/16, ADE20K",
    model="vit_b",
    image_size=(512, 512),
    reported=124.7,
    source=_TABLE_6,
)
_CITYSCAPES = _ADE._replace(
    name="Segmenter ViT-L/16, Cityscapes",
    image_size=(768, 768),
    classes=19,
    reported=995.6,
    source=_CODE.format("Segmenter"),
    decoder_layers=1,
)
_PASCAL = _ADE._replace(
    name="Segmenter ViT-L/16, Pascal Context",
    image_size=(480, 480),
    classes=60,
    reported=338.7,
    source=_CODE.format("Segmenter"),
)
_SIZES = _squares(
    _ADE._replace(where="logits"),
    _TABLE_3,
    (10, 8, 274.0),
    (10, 12, 290.9),
    (10, 16, 315.1),
    (10, 20, 347.2),
    (10, 24, 388.2),
    (10, 28, 438.9),
)
_DEFAULT = _SIZES[-1]
_SWAG_L = ExpediteCost(
    network="swag",
    name="SWAG ViT-L/16",
    model="vit_l",
    image_size=(512, 512),
    patch_size=16,
    classes=1000,
    reported=364.8,
    source=_CODE.format("SWAG"),
)
_SWAG_H = _SWAG_L._replace(
    name="SWAG ViT-H/14", model="vit_h", image_size=(518, 518), patch_size=14, reported=1023.2
)
_NYU = ExpediteCost(
    network="dpt",
    name="DPT R50 + ViT-B/16, NYUv2",
    model="vit_b",
    image_size=(480, 640),
    patch_size=16,
    classes=1,
    reported=None,
    source=_CODE.format("DPT"),
    where="blocks",
)
_KITTI = _NYU._replace(name="DPT R50 + ViT-B/16, KITTI", image_size=(352, 1216))

# Costs of plain hosts, with unique names. Two sources are left out: Table 7 does not state the
# clusters, and the README of the released code counts Segmenter with clusters in yet another way,
# 443.84 where the paper has 438.9.
EXPEDITE = (
    _ADE,
    *_SIZES,
    *_with(_DEFAULT, "window", {3: 438.6, 5: 438.9, 7: 439.6}),
    *_with(_DEFAULT, "iterations", {5: 438.9, 10: 439.6, 15: 440.2, 20: 440.8}),
    *_with(_DEFAULT, "neighbors", {10: 438.9, 20: 438.9, 50: 439.0}),
    # Not reported: the cost of the same setting if the decoder sees all tokens.
    _DEFAULT._replace(name=f"{_DEFAULT.name}, blocks reconstructed", reported=None, where="blocks"),
    _ADE_SMALL,
    *_squares(_ADE_SMALL._replace(where="logits"), _TABLE_6, (7, 22, 91.9)),
    _CITYSCAPES,
    _PASCAL,
    _SWAG_L,
    *_squares(_SWAG_L, _SWAG_L.source, (12, 23, 275.8), (6, 23, 228.5), (8, 16, 179.0)),
    _SWAG_H,
    *_squares(_SWAG_H, _SWAG_H.source, (10, 26, 652.4), (4, 25, 514.1), (8, 18, 422.7)),
    # The values are differences to 560.2 and 810.0. The authors' alpha is one less: it is the index
    # of the block after which they cluster.
    *_squares(_NYU, _NYU.source, (7, 24, 56.0), (5, 16, 121.0), (3, 14, 165.2)),
    *_squares(_KITTI, _KITTI.source, (7, 28, 86.6), (5, 20, 178.2), (5, 16, 196.4)),
)
