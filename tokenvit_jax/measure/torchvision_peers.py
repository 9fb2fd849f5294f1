"""Builds detectors of torchvision's modules as peers, with random weights.

torch, torchvision and timm are imported by the functions that need them; nothing is downloaded.
"""

import numpy as np

from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.measure.torch_peers import TorchWork, check_peers

NUM_CLASSES = 80  # of COCO
OBJECTS = 8  # of an image of a random batch
LEVELS = ("0", "1", "2", "3")  # that regions read
# Standard deviation of the class scores before the softmax. Random weights give almost equal ones,
# of which none is a detection; then no masks would be predicted.
SCORE_STD = 1.5


def random_objects(batch_size: int, image_size: tuple[int, int]) -> np.ndarray:
    """Returns boxes of objects (B, OBJECTS, 4) [x1 y1 x2 y2, pixels] within images.

    Args:
      batch_size: B.
      image_size: height and width [pixels].
    """
    draw = np.random.default_rng(2)
    low = draw.uniform(0, 0.5, (batch_size, OBJECTS, 2))
    high = low + draw.uniform(0.1, 0.5, low.shape)
    return (np.concatenate([low, high], -1) * (image_size[::-1] * 2)).astype(np.float32)


def torchvision_work(name: str, image_size: tuple[int, int], mode: str) -> TorchWork:
    """Builds a detector of torchvision's modules with its losses.

    Args:
      name: a key of `PEERS`.
      image_size: height and width [pixels].
      mode: "forward" | "train".

    Raises:
      UserError: there is no such peer, or as :func:`tokenvit_jax.measure.torch_peers.check_peers`.
    """
    del mode  # the same network in both
    if name not in PEERS:
        hint, valid = did_you_mean(name, PEERS), ", ".join(PEERS)
        raise UserError(f"--against={name} is not valid for this task{hint}; valid: {valid}")
    check_peers("torchvision")
    return PEERS[name](image_size)


def mask_rcnn_swin_t(image_size: tuple[int, int], **backbone) -> TorchWork:
    """Returns Mask R-CNN on timm's Swin-T, with norms of its maps as in Swin's detectors.

    Its numbers of anchors, proposals, samples and detections are those of `MaskRcnn` here; regions
    are read at 2 x 2 points of every bin, as torchvision does.

    Args:
      image_size: height and width [pixels].
      **backbone: arguments of timm's Swin that differ from Swin-T.
    """
    import timm
    import torch

    backbone = {"drop_path_rate": 0.1, **backbone}
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, img_size=image_size, **backbone
    )
    module = _mask_rcnn(swin)
    _spread_scores(module, torch.randn(1, 3, *image_size))

    def targets(batch_size, generator):
        del generator
        return torch.from_numpy(random_objects(batch_size, image_size))

    def loss(compute, images, boxes):
        objects = [
            {"boxes": own, "labels": own.new_ones(len(own), dtype=torch.int64), "masks": masks}
            for own, masks in zip(boxes, _filled(boxes, image_size), strict=True)
        ]
        return sum(compute(images, objects).values())

    return TorchWork(module, targets, loss)


def _mask_rcnn(swin):
    """Returns a module of images (B, 3, H, W) and, in training, of targets."""
    from torch import nn
    from torchvision.models.detection import faster_rcnn, mask_rcnn, rpn
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.roi_heads import RoIHeads
    from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    dims = swin.feature_info.channels()

    class MaskRcnn(nn.Module):
        def __init__(self):
            super().__init__()
            self.swin = swin
            self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
            self.fpn = FeaturePyramidNetwork(dims, 256, LastLevelMaxPool())
            anchors = rpn.AnchorGenerator(
                tuple((8 * stride,) for stride in (4, 8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 5
            )
            self.rpn = rpn.RegionProposalNetwork(
                anchors, rpn.RPNHead(256, 3), 0.7, 0.3, 256, 0.5,
                {"training": 2000, "testing": 1000}, {"training": 1000, "testing": 1000}, 0.7,
            )  # fmt: skip
            self.heads = RoIHeads(
                MultiScaleRoIAlign(LEVELS, 7, 2),
                faster_rcnn.TwoMLPHead(256 * 7 * 7, 1024),
                faster_rcnn.FastRCNNPredictor(1024, NUM_CLASSES + 1),
                0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100,
                MultiScaleRoIAlign(LEVELS, 14, 2),
                mask_rcnn.MaskRCNNHeads(256, (256,) * 4, 1),
                mask_rcnn.MaskRCNNPredictor(256, 256, NUM_CLASSES + 1),
            )  # fmt: skip

        def forward(self, images, targets=None):
            sizes = [tuple(images.shape[2:])] * len(images)
            maps = [
                norm(x).permute(0, 3, 1, 2)
                for norm, x in zip(self.norms, self.swin(images), strict=True)
            ]
            levels = self.fpn(dict(zip(LEVELS, maps, strict=True)))
            proposals, losses = self.rpn(ImageList(images, sizes), levels, targets)
            found, own = self.heads(levels, proposals, sizes, targets)
            return {**losses, **own} if self.training else found

    return MaskRcnn()


def _spread_scores(module, images):
    """Scales the weights of the class scores so that some of the boxes are detections."""
    import torch

    seen = []
    layer = module.heads.box_predictor.cls_score
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.append(output.std()))
    with torch.inference_mode():
        module.eval()(images)
    handle.remove()
    with torch.no_grad():
        layer.weight.mul_(SCORE_STD / float(seen[0]))


def _filled(boxes, image_size):
    """Returns masks (B, n, H, W) that fill boxes (B, n, 4)."""
    import torch

    y, x = (torch.arange(side, device=boxes.device) for side in image_size)
    x1, y1, x2, y2 = boxes[..., None].unbind(-2)
    rows, columns = (y >= y1) & (y < y2), (x >= x1) & (x < x2)
    return (rows[..., None] & columns[..., None, :]).to(torch.uint8)


PEERS = {"mask_rcnn_swin_t": mask_rcnn_swin_t}
