"""Costs that Expedite reports for Mask2Former with Swin-L, and the rules by which they are counted.

The released code counts a traced graph: one for each multiply-add of linear layers, convolutions
and products of attention, :class:`Counter` for norms, sampling and resizing, and nothing for
softmax, activations and sums. Its clustering computes distances to all centres of a window in every
round, and its reconstruction, too, so that neither the neighbourhood nor the number of neighbours
changes the cost.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import tokenvit_jax as tv
from tokenvit_jax.heads import Mask2Former
from tokenvit_jax.models.expedite import Expedite
from tokenvit_jax.models.swin import SwinSettings
from tokenvit_jax.tasks.masks.model import MaskSegmenter

MODEL, WINDOW = "swin_l", 12
CENTERS = 8  # rows and columns of the centres of a window
STRIDES = (32, 16, 8)  # of the levels of the pixel decoder
BACKBONE_SIZE = (1152, 1152)  # of the images for which costs of the backbone are reported


class Counter(NamedTuple):
    """Operations that count besides products.

    Attributes:
      norm: per element of LayerNorm and GroupNorm.
      resize: per element of a resized map or table.
      pool: per element that is averaged to the first centres.
    """

    norm: int = 5
    resize: int = 4
    pool: int = 1


RELEASED, PRODUCTS = Counter(), Counter(0, 0, 0)


class Expedited(NamedTuple):
    """A released setting of Expedite in Mask2Former.

    Attributes:
      name: data set and task.
      location: number of blocks before the clustering in the released configuration, counted over
        all stages; the first two stages have 4.
      counted_location: the location for which the cost is the reported one.
      window: see :class:`tokenvit_jax.models.expedite.Expedite`, also for the next three.
      iterations: rounds of clustering.
      neighbors: nearest centres in the reconstruction.
      temperature: temperature of both softmaxes.
      gmacs: reported 10^9 multiply-adds of the backbone at `BACKBONE_SIZE`.
      metric: reported accuracy, and the accuracy without clustering, in %.
    """

    name: str
    location: int
    counted_location: int
    window: int
    iterations: int
    neighbors: int
    temperature: float
    gmacs: int
    metric: tuple[str, float, float]


PLAIN_GMACS = 937  # reported, without clustering
EXPEDITE = (
    Expedited("COCO panoptic", 10, 9, 7, 5, 10, 20.0, 663, ("PQ", 56.8, 57.8)),
    Expedited("COCO instance", 12, 11, 11, 5, 60, 100.0, 705, ("AP", 49.1, 50.1)),
    Expedited("ADE20K panoptic", 14, 14, 7, 4, 49, 100.0, 769, ("PQ", 47.6, 48.0)),
    Expedited("ADE20K semantic", 7, 7, 5, 5, 10, 100.0, 620, ("mIoU", 55.5, 55.8)),
)


class Network(NamedTuple):
    """A published Mask2Former with Swin-L.

    Attributes:
      name: data set and task.
      num_classes: K.
      num_queries: Q.
      params_m: reported parameters [10^6]; None: not reported.
    """

    name: str
    num_classes: int
    num_queries: int
    params_m: int | None


NETWORKS = (
    Network("COCO panoptic", 133, 200, 216),
    Network("COCO instance", 80, 200, None),
    Network("ADE20K semantic", 150, 100, 215),
    Network("ADE20K panoptic", 150, 200, None),
    Network("ADE20K instance", 100, 200, None),
)
# Reported 10^9 multiply-adds of the whole network for ADE20K semantic at 640 x 640. For COCO, there
# are only means over the images of a split.
ADE20K_SEMANTIC = ((640, 640), 403)


def model_of(network: Network, expedite: Expedite | None = None) -> MaskSegmenter:
    """Returns the model of a network, whose backbone may cluster tokens."""
    backbone = tv.create_model(MODEL, window_size=WINDOW, num_classes=0, expedite=expedite)
    return MaskSegmenter(backbone, Mask2Former(network.num_classes, network.num_queries))


def expedite_of(row: Expedited, location: int) -> Expedite:
    """Returns the setting of a row, with the clustering at a location as in `Expedited`."""
    swin: SwinSettings = tv.create_model(MODEL).settings
    stage = swin.expedited_stage
    alpha = location - sum(swin.depths[:stage])
    return Expedite(
        alpha, swin.depths[stage] - alpha, (CENTERS, CENTERS), window=row.window,
        iterations=row.iterations, neighbors=row.neighbors, temperature=row.temperature,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Multiply-adds of one image
# ------------------------------------------------------------------------------------------------


def backbone_macs(
    size: tuple[int, int],
    counter: Counter = RELEASED,
    location: int | None = None,
    iterations: int = 0,
) -> int:
    """Counts Swin-L, whose maps are padded to whole windows of tokens.

    Args:
      size: height and width of the image [pixels].
      counter: operations besides products.
      location: blocks before the clustering, over all stages; None: no clustering.
      iterations: rounds of clustering.
    """
    swin: SwinSettings = tv.create_model(MODEL).settings
    rows, columns = (side // 4 for side in size)
    tokens = rows * columns
    macs = tokens * swin.dims[0] * (3 * 4**2 + counter.norm)
    for stage, (dim, depth) in enumerate(zip(swin.dims, swin.depths, strict=True)):
        if stage:
            rows, columns = -(-rows // 2), -(-columns // 2)
            tokens = rows * columns
            # Four tokens become one, with twice the channels.
            macs += tokens * 2 * dim * (counter.norm + dim)
        windows = -(-rows // WINDOW) * -(-columns // WINDOW)
        plain = block_macs(dim, tokens, windows, WINDOW**2, counter)
        if location is None or stage != swin.expedited_stage:
            macs += depth * plain
        else:
            first = location - sum(swin.depths[:stage])
            centers = block_macs(dim, windows * CENTERS**2, windows, CENTERS**2, counter)
            centers += counter.resize * swin.num_heads[stage] * (2 * CENTERS - 1) ** 2
            pairs = windows * WINDOW**2 * CENTERS**2
            macs += first * plain + (depth - first) * centers
            # Distances and sums of every round, and of the reconstruction.
            macs += 2 * (iterations + 1) * pairs * dim + counter.pool * windows * WINDOW**2 * dim
        macs += counter.norm * tokens * dim  # the norm of the map
    return macs


def block_macs(dim: int, tokens: int, windows: int, window: int, counter: Counter) -> int:
    """Counts a block of Swin.

    Args:
      dim: channels.
      tokens: tokens of the map.
      windows: number of windows, with padding.
      window: tokens of a window.
      counter: operations besides products.
    """
    attention = windows * window * (4 * dim**2 + 2 * window * dim)
    return attention + tokens * (8 * dim**2 + 2 * counter.norm * dim)


def pixel_decoder_macs(
    size: tuple[int, int], dims: Sequence[int], counter: Counter = RELEASED
) -> int:
    """Counts the pixel decoder, without the enlarged map.

    Args:
      size: height and width of the image [pixels].
      dims: channels of the four maps.
      counter: operations besides products. Sampling counts four for every sampled number.
    """
    head = Mask2Former(1)
    dim, levels, finest = head.channels, level_cells(size), size[0] * size[1] // 16
    macs = sum(n * dim * (old + counter.norm) for n, old in zip(levels, dims[:0:-1], strict=True))
    samples = head.num_heads * len(levels) * head.num_points
    linear = dim * (3 * samples + 2 * dim + 2 * head.encoder_hidden)
    sampling = 4 * samples * dim // head.num_heads
    macs += head.encoder_depth * sum(levels) * (linear + sampling + 2 * counter.norm * dim)
    macs += finest * dim * (dims[0] + 9 * dim + head.channels + 2 * counter.norm)
    return macs


def decoder_macs(
    size: tuple[int, int],
    network: Network,
    counter: Counter = RELEASED,
    *,
    cross_logits: bool = False,
) -> int:
    """Counts the decoder of queries.

    Args:
      size: height and width of the image [pixels].
      network: numbers of classes and queries.
      counter: operations besides products.
      cross_logits: whether the products of queries and keys in cross-attention count, which the
        released program misses.
    """
    head, queries = Mask2Former(1), network.num_queries
    dim, levels, finest = head.channels, level_cells(size), size[0] * size[1] // 16
    macs = 0
    for i in range(head.depth):
        cells = levels[i % len(levels)]
        macs += 2 * dim**2 * (queries + cells) + (1 + cross_logits) * queries * cells * dim
        macs += queries * dim * (4 * dim + 2 * queries + 2 * head.hidden + 3 * counter.norm)
    predictions = counter.norm + network.num_classes + 1 + 3 * dim + finest
    macs += (head.depth + 1) * queries * dim * predictions
    # Masks are resized for the next layer, also those after the last one.
    resized = sum(levels[i % len(levels)] for i in range(head.depth + 1))
    return macs + counter.resize * queries * resized


def level_cells(size: tuple[int, int]) -> list[int]:
    """Returns the number of cells of each level, the coarsest first."""
    return [math.prod(side // stride for side in size) for stride in STRIDES]


def network_gmacs(size: tuple[int, int], network: Network) -> float:
    """Counts a whole network as far as the released program does, without enlarging maps and masks.

    Args:
      size: height and width of the image [pixels].
      network: the network.

    Returns:
      10^9 multiply-adds.
    """
    dims = tv.create_model(MODEL).settings.dims
    parts = backbone_macs(size), pixel_decoder_macs(size, dims), decoder_macs(size, network)
    # The finest map of the pixel decoder receives an enlarged one.
    enlarged = RELEASED.resize * size[0] * size[1] // 16 * Mask2Former(1).channels
    return (sum(parts) + enlarged) / 1e9


def semantic_gmacs(size: tuple[int, int], network: Network) -> float:
    """Counts :func:`network_gmacs` and semantic inference, 10^9 multiply-adds.

    Masks are enlarged to pixels and summed up with the probabilities of their classes; the products
    of queries and keys in cross-attention count, too.

    Args:
      size: height and width of the image [pixels].
      network: the network.
    """
    pixels = size[0] * size[1]
    logits = decoder_macs(size, network, cross_logits=True) - decoder_macs(size, network)
    sums = pixels * network.num_queries * (network.num_classes + RELEASED.resize)
    return network_gmacs(size, network) + (logits + sums) / 1e9
