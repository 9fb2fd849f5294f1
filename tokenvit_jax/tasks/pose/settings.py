"""The configuration entries of pose estimation."""

from ml_collections import ConfigDict

from tokenvit_jax.config import ENTRIES as COMMON
from tokenvit_jax.config import Entry, input_shape, size_entry
from tokenvit_jax.data.record import Skeleton
from tokenvit_jax.errors import UserError
from tokenvit_jax.ops.heatmaps import QUARTER, REFINEMENTS
from tokenvit_jax.valid import Flag, Group, Number, OneOf, Several, Text

MULTIPLE = 32  # of the sides of the input [pixels]: the largest stride of a backbone
STRIDE = 4  # of the heat maps [pixels]

ENTRIES: dict[str, Entry] = {
    "model": COMMON["model"]._replace(default="clustr_s"),
    "image_size": COMMON["image_size"]._replace(default=size_entry((256, 192))),
    "head": Entry(
        "mta",
        "head on the maps of a hierarchical backbone; mta: attention from coarse to fine maps; "
        "deconvolution: transposed convolutions of the last map",
        OneOf(("mta", "deconvolution")),
    ),
    "head_overrides": Entry({}, "settings of the head", Group()),
    "pose.sigma": Entry(
        2.0, "standard deviation of the targets [pixels of the heat map]", Number(0.5, 100)
    ),
    "pose.unbiased": Entry(
        False,
        "crops and heat maps by unit steps between pixels, Gaussians around the keypoint itself "
        "(UDP); False: around the nearest pixel",
        Flag(),
    ),
    "pose.part_weights": Entry(
        (),
        "factors of the loss for the keypoints of each part of the skeleton; (): 1",
        Several(Number(0, 1000)),
    ),
    "inference.refinement": Entry(
        QUARTER,
        "places between pixels; quarter: towards the larger neighbour; quarter_by_axis: also along "
        "the border; dark: by a parabola (DARK)",
        OneOf(REFINEMENTS),
    ),
    "inference.flip": Entry(True, "average with the heat maps of the mirrored image", Flag()),
    "data.boxes": Entry(
        "",
        "JSON file with a detector's boxes of the evaluation split, in COCO's format of results; "
        "empty: the annotated boxes",
        Text(),
    ),
    # Random frames around the box; their sides are 1.25 times as long as those of the box.
    "augment.shift": Entry(
        0.0, "largest shift of 30 % of the frames [sides of the frame]", Number(0, 1)
    ),
    "augment.half_body": Entry(0.0, "probability of a frame around half of the body", Number(0, 1)),
    "augment.scale": Entry(
        0.0, "standard deviation and largest change of the frame's size", Number(0, 1, below=True)
    ),
    "augment.rotation": Entry(
        0.0,
        "standard deviation, and half of the largest one, of the rotation of 60 % of the frames "
        "[degrees]",
        Number(0, 180),
    ),
}


def heatmap_size(input_size: tuple[int, int]) -> tuple[int, int]:
    """Returns height and width of the heat maps [pixels] from those of the input."""
    height, width = input_size
    return height // STRIDE, width // STRIDE


def check_size(config: ConfigDict) -> None:
    """Raises UserError unless the sides of the input are multiples of 32."""
    size = input_shape(config)[:2]
    if any(side % MULTIPLE for side in size):
        raise UserError(
            f"config.image_size={size} is not valid; valid: height and width in multiples of "
            f"{MULTIPLE} pixels"
        )


def keypoint_weights(config: ConfigDict, skeleton: Skeleton) -> list[float]:
    """Returns the factor of the loss for every keypoint.

    Raises:
      UserError: there are factors for another number of parts.
    """
    weights, parts = tuple(config.pose.part_weights), skeleton.parts
    if not weights:
        return [1.0] * len(skeleton.names)
    if len(weights) != len(parts):
        raise UserError(
            f"config.pose.part_weights={weights} has {len(weights)} factors; valid: one for each "
            f"of {', '.join(parts)}"
        )
    factors = [1.0] * len(skeleton.names)
    for weight, points in zip(weights, parts.values(), strict=True):
        for point in points:
            factors[point] = float(weight)
    return factors
