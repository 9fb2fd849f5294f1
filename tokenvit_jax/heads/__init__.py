"""Necks and heads for dense tasks; they read the tokens, maps or taps of a backbone."""

from tokenvit_jax.heads.detection import Detections, DetectorHead, Targets
from tokenvit_jax.heads.dpt import DptHead
from tokenvit_jax.heads.fcn import FcnHead
from tokenvit_jax.heads.head import Head, MapHead
from tokenvit_jax.heads.htc import Htc
from tokenvit_jax.heads.mask2former import Mask2Former
from tokenvit_jax.heads.mask_rcnn import MaskRcnn
from tokenvit_jax.heads.masked_decoder import MaskPredictions
from tokenvit_jax.heads.pose import DeconvHead, MtaHead, PoseHead
from tokenvit_jax.heads.retinanet import RetinaNet
from tokenvit_jax.heads.segmenter import LinearDecoder, MaskTransformer
from tokenvit_jax.heads.semantic_fpn import SemanticFpn
from tokenvit_jax.heads.upernet import UperNet

__all__ = [
    "DeconvHead",
    "Detections",
    "DetectorHead",
    "DptHead",
    "FcnHead",
    "Head",
    "Htc",
    "LinearDecoder",
    "MapHead",
    "Mask2Former",
    "MaskPredictions",
    "MaskRcnn",
    "MaskTransformer",
    "MtaHead",
    "PoseHead",
    "RetinaNet",
    "SemanticFpn",
    "Targets",
    "UperNet",
]
