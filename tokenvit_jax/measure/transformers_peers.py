"""Builds the dense networks of Hugging Face's transformers as peers, with random weights.

torch and transformers are imported by the functions that need them; nothing is downloaded.
"""

import numpy as np

from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.measure.torch_peers import TorchWork, import_package

NUM_CLASSES = 150  # of ADE20K
NUM_KEYPOINTS = 133  # of COCO-WholeBody
SEGMENTS = 8  # of an image of a random batch
# Scale and shift from the output to inverse depth, and largest depth, of DPT on NYU [1/m, 1/m, m].
SCALE, SHIFT, MAX_DEPTH = 0.000305, 0.1378, 10.0
# SILog: weight of the squared mean, and what keeps the root's gradient finite.
MEAN_WEIGHT, EPSILON = 0.85, 1e-12


def transformers_work(name: str, image_size: tuple[int, int], mode: str) -> TorchWork:
    """Builds a network of transformers with the loss of its task.

    Args:
      name: a key of `PEERS`.
      image_size: height and width [pixels].
      mode: "forward" | "train"; training adds the auxiliary head.

    Raises:
      UserError: torch or transformers is not installed, there is no such peer, or it does not take
        images of this size.
    """
    if name not in PEERS:
        hint, valid = did_you_mean(name, PEERS), ", ".join(PEERS)
        raise UserError(f"--against={name} is not valid for this task{hint}; valid: {valid}")
    torch, _ = import_package("transformers")
    work = PEERS[name](image_size, mode)
    try:
        with torch.inference_mode():
            work.module.eval()(torch.zeros(1, 3, *image_size))
    except (RuntimeError, ValueError) as error:
        height, width = image_size
        message = str(error).strip().partition("\n")[0]
        raise UserError(f"{name} does not take {height}x{width} images: {message}") from error
    return work


def upernet_swin_t(image_size: tuple[int, int], mode: str) -> TorchWork:
    """Returns UperNet on Swin-T, as mmsegmentation trains it, and the loss of both heads."""
    import torch
    from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = SwinConfig(image_size=image_size, drop_path_rate=0.3, out_features=stages)
    module = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone,
            num_labels=NUM_CLASSES,
            auxiliary_in_channels=4 * backbone.embed_dim,
            use_auxiliary_head=mode == "train",
        )
    )

    def targets(batch_size, generator):
        return torch.randint(NUM_CLASSES, (batch_size, *image_size), generator=generator)

    def loss(compute, images, labels):
        return compute(images, labels=labels).loss

    # PyTorch's BatchNorm does not train on the one value of the coarsest cell of one image.
    return TorchWork(module, targets, loss, smallest_batch=2)


def dpt_hybrid(image_size: tuple[int, int], mode: str) -> TorchWork:
    """Returns DPT on ViT-B with a ResNet stem, and the scale-invariant logarithmic error."""
    del mode  # the same network in both
    import torch
    from transformers import DPTConfig, DPTForDepthEstimation

    module = DPTForDepthEstimation(
        DPTConfig(
            is_hybrid=True,
            image_size=image_size[0],
            neck_hidden_sizes=[256, 512, 768, 768],
            reassemble_factors=[1, 1, 1, 0.5],
            backbone_featmap_shape=[1, 1024, image_size[0] // 16, image_size[1] // 16],
        )
    )

    def targets(batch_size, generator):
        return MAX_DEPTH * (0.05 + 0.9 * torch.rand(batch_size, *image_size, generator=generator))

    def loss(compute, images, depths):
        inverse = (SCALE * compute(images).predicted_depth.float() + SHIFT).clamp(min=1e-8)
        error = -torch.log(inverse) - torch.log(depths)
        mean = error.mean((1, 2))
        spread = (error * error).mean((1, 2)) - MEAN_WEIGHT * mean * mean
        return torch.sqrt(spread.clamp(min=0) + EPSILON).mean()

    return TorchWork(module, targets, loss)


def mask2former_swin_t(image_size: tuple[int, int], mode: str) -> TorchWork:
    """Returns Mask2Former on Swin-T, and its loss on images with :data:`SEGMENTS` stripes."""
    del mode  # the same network in both
    import torch
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = SwinConfig(image_size=image_size, drop_path_rate=0.3, out_features=stages)
    module = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=backbone, num_labels=NUM_CLASSES)
    )
    stripes = torch.as_tensor(striped_segments(image_size))
    numbers = torch.arange(1, SEGMENTS + 1)
    masks = (stripes == numbers[:, None, None]).float()

    def targets(batch_size, generator):
        classes = torch.randint(NUM_CLASSES, (batch_size, SEGMENTS), generator=generator)
        return masks.expand(batch_size, -1, -1, -1), classes

    def loss(compute, images, targets):
        masks, classes = map(list, targets)
        return compute(images, mask_labels=masks, class_labels=classes).loss.sum()

    return TorchWork(module, targets, loss)


def pose_swin_t(image_size: tuple[int, int], mode: str) -> TorchWork:
    """Returns transposed convolutions on Swin-T, and the squared error of its heat maps.

    transformers has no such network; the backbone is its own, and the head of Xiao et al. 2018 is
    made of PyTorch's layers. The heat maps of the targets are given.
    """
    del mode  # the same network in both
    import torch
    from transformers import SwinBackbone, SwinConfig

    backbone = SwinConfig(image_size=image_size, drop_path_rate=0.1, out_features=["stage4"])
    module = _heatmap_network(SwinBackbone(backbone), 8 * backbone.embed_dim)

    def targets(batch_size, generator):
        height, width = image_size
        return torch.rand(batch_size, NUM_KEYPOINTS, height // 4, width // 4, generator=generator)

    def loss(compute, images, targets):
        return torch.nn.functional.mse_loss(compute(images).float(), targets)

    return TorchWork(module, targets, loss)


def _heatmap_network(backbone, channels):
    """Returns a module with a head on the last map of a backbone."""
    from torch import nn

    class HeatmapNetwork(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, layers, dim = backbone, [], channels
            for _ in range(3):
                layers += [
                    nn.ConvTranspose2d(dim, 256, 4, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(256),
                    nn.ReLU(),
                ]
                dim = 256
            self.head = nn.Sequential(*layers, nn.Conv2d(dim, NUM_KEYPOINTS, 1))

        def forward(self, images):
            return self.head(self.backbone(images).feature_maps[-1])

    return HeatmapNetwork()


def striped_segments(image_size: tuple[int, int]) -> np.ndarray:
    """Returns a map of :data:`SEGMENTS` upright stripes, 1, 2, ... (H, W).

    Args:
      image_size: H and W [pixels].
    """
    height, width = image_size
    return np.tile(1 + np.arange(width) * SEGMENTS // width, (height, 1))


PEERS = {
    "upernet_swin_t": upernet_swin_t,
    "dpt_hybrid": dpt_hybrid,
    "mask2former_swin_t": mask2former_swin_t,
    "pose_swin_t": pose_swin_t,
}
