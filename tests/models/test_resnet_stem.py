"""The ResNet of hybrids against timm's, with odd sizes; the hybrid as a classifier.

The arrays of `golden/resnet_stem_33x47.npz` are of timm 0.4.12's `ResNetV2` without pre-activation.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tokenvit_jax.errors import UserError
from tokenvit_jax.models import create_model
from tokenvit_jax.models.resnet_stem import ResNet, ResNetStem
from tokenvit_jax.weights.timm_vit import stem_rules, stem_settings

GOLDEN = np.load(Path(__file__).parent / "golden" / "resnet_stem_33x47.npz")
WEIGHTS = {
    name.replace("w/", "patch_embed.backbone.", 1): x.astype(np.float32)
    for name, x in GOLDEN.items()
    if name.startswith("w/")
}


def params_of(stem, images):
    """Returns timm's parameters by the rules of the hybrid."""

    def parameter(path):
        for rule in stem_rules():
            if numbers := re.fullmatch(rule.ours.replace("{}", r"(\d+)"), f"stem/{path}"):
                return rule.change.to_ours(WEIGHTS[rule.theirs.format(*numbers.groups())])
        raise LookupError(path)

    shapes = jax.eval_shape(stem.init, jax.random.key(0), images)["params"]
    paths = flatten_dict(shapes, sep="/")
    assert len(paths) == len(WEIGHTS)
    return unflatten_dict({path: parameter(path) for path in paths}, sep="/")


def test_maps_equal_timm():
    settings = ResNetStem(**stem_settings(WEIGHTS), num_groups=4)
    assert (settings.first, settings.widths, settings.depths) == (8, (16, 24, 32), (1, 2, 1))
    stem, images = ResNet(settings), GOLDEN["0/image"].astype(np.float32).transpose(0, 2, 3, 1)
    maps = jax.jit(stem.apply)({"params": params_of(stem, images)}, images)
    for number, found in enumerate(maps, 1):
        expected = GOLDEN[f"0/stage{number}"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_the_hybrid_as_a_classifier():
    """A patch is 2 x 2 cells of the last map; at the start, blocks are their shortcuts."""
    stem = {"first": 8, "widths": (8, 16), "depths": (1, 1), "num_groups": 4}
    model = create_model(
        "vit_b_r50", num_classes=3, dim=16, depth=1, num_heads=2, patch_size=16, stem=stem,
        position_size=(64, 64), dtype=jnp.bfloat16, remat=True,
    )  # fmt: skip
    images = jax.random.normal(jax.random.key(1), (1, 40, 64, 3))

    @jax.jit
    def run(key):
        variables = model.init(key, images)
        loss = lambda v: (model.apply(v, images) ** 2).sum()  # noqa: E731
        return variables, jax.grad(loss)(variables)["params"]

    variables, gradients = run(jax.random.key(0))
    assert variables["params"]["patches"]["kernel"].shape == (2, 2, 16, 16)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.abs(gradients["stem"]["conv"]["kernel"]).max() > 0
    assert np.abs(gradients["stem"]["block_1_0"]["norm3"]["scale"]).max() > 0
    assert not np.any(variables["params"]["stem"]["block_1_0"]["norm3"]["scale"])
    assert model.layer_of("stem/block_1_0/conv1/kernel") == 0
    with pytest.raises(UserError, match="images have 4 channels; the model was initialised for 3"):
        model.apply(variables, jnp.zeros((1, 32, 32, 4)))
