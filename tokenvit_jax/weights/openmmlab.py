"""A Swin Transformer in the files of mmsegmentation and mmdetection, which share its two layouts.

The layout "original" is that of Swin's own code for segmentation and detection, forks of early
versions, which published most of these weights. Later versions have other names, "renamed", and
another order of channels in patch mergings.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from tokenvit_jax.weights import swin
from tokenvit_jax.weights.rules import SAME, Arrays, Change, Rule, norm, within

# A patch merging of the renamed layout has the inputs 4 c + 2 row + column. Here and in Swin's code
# they are (2 column + row) C + c.
_SQUARES = [0, 2, 1, 3]  # its own inverse


def _to_ours(x: np.ndarray) -> np.ndarray:
    """Reorders the last axis of the arrays of a patch merging, 4 C."""
    return x.reshape(*x.shape[:-1], -1, 4).swapaxes(-1, -2)[..., _SQUARES, :].reshape(x.shape)


def _to_theirs(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-1], 4, -1)[..., _SQUARES, :].swapaxes(-1, -2).reshape(x.shape)


_MERGING_NORM = Change(_to_ours, _to_theirs)
_MERGING = Change(lambda x: _to_ours(x).transpose(), lambda x: _to_theirs(x.transpose()))

_NEW_NAMES = (  # patterns in the original names -> new names
    (r"^layers\.", "stages."),
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"\.attn\.", ".attn.w_msa."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
)


def _original_rules(backbone: nn.Module) -> list[Rule]:
    return swin.rules(backbone, merging_first=False, classifier="head")


def _new_rules(backbone: nn.Module) -> list[Rule]:
    return [_renamed(rule) for rule in _original_rules(backbone)]


def _renamed(rule: Rule) -> Rule:
    theirs, change = rule.theirs, rule.change
    for pattern, name in _NEW_NAMES:
        theirs = re.sub(pattern, name, theirs)
    if ".downsample." in theirs:
        change = _MERGING_NORM if change is SAME else _MERGING
    return Rule(rule.ours, theirs, change)


class Backbone(NamedTuple):
    """One of the layouts of a Swin and the norms of its maps.

    Attributes:
      attention: name of the attention of the first block of a stage, with `{}` for the stage.
      backbone_rules: Swin -> its rules, without the name of the backbone.
    """

    attention: str
    backbone_rules: Callable[[nn.Module], list[Rule]]

    def rules(self, backbone: nn.Module) -> list[Rule]:
        """Returns the rules of the backbone and of the norms of its maps, in the whole model."""
        found = within("backbone", "backbone", self.backbone_rules(backbone))
        for i in range(4):
            found += norm(f"map_norm_{i + 1}", f"backbone.norm{i}")
        return found

    @property
    def marks(self) -> tuple[str, ...]:
        """Regular expressions for names by which a file is recognised."""
        first = re.escape(self.attention.format(0))
        return (rf"{first}\.qkv\.weight", rf"{first}\.{swin.TABLE_NAME}")

    def model_overrides(self, arrays: Arrays) -> dict[str, Any]:
        """Returns the settings of the backbone that the arrays of a file determine."""
        return swin.window_overrides(arrays, self.attention)


ORIGINAL = Backbone("backbone.layers.{}.blocks.0.attn", _original_rules)
RENAMED = Backbone("backbone.stages.{}.blocks.0.attn.w_msa", _new_rules)
