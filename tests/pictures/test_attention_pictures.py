"""Pictures of attention show the right weights at the right patches."""

import numpy as np
import pytest

from tokenvit_jax import ops
from tokenvit_jax.errors import UserError
from tokenvit_jax.models.vit import ViTSettings
from tokenvit_jax.pictures.attention import draw, to_patches

rng = np.random.default_rng(0)
# 3 x 5 patches of 8 pixels; the last column reaches 4 pixels beyond the image.
SETTINGS = ViTSettings(dim=8, num_heads=2, patch_size=8, distilled=True)
IMAGE = rng.integers(256, size=(24, 36, 3), dtype=np.uint8)


def weights(*shape):
    x = rng.exponential(size=shape)
    return (x / x.sum(-1, keepdims=True)).astype(np.float32)


BLOCKS = [weights(2, 17, 17) for _ in range(3)]


@pytest.mark.parametrize("by_class_token", [True, False])
def test_maps(by_class_token):
    figures = draw(IMAGE, BLOCKS, SETTINGS, by_class_token, "$a$b_$.png")
    assert list(figures) == ["attention", "rollout"]
    rollout = np.asarray(ops.attention_rollout(np.stack(BLOCKS)[None]))[0]
    titles = (["head 0", "head 1"], ["rollout of 3 blocks"])
    for figure, maps, names in zip(
        figures.values(), (BLOCKS[-1], rollout[None]), titles, strict=True
    ):
        figure.draw_without_rendering()  # a title with dollar signs is no formula
        first, *others = figure.axes[: 1 + len(names)]
        np.testing.assert_array_equal(first.images[0].get_array(), IMAGE)
        assert first.get_title() == "$a$b_$.png"
        assert [axis.get_title() for axis in others] == names
        highest = 0
        for axis, values in zip(others, maps, strict=True):
            shown = axis.images[1].get_array()
            query = values[0] if by_class_token else values[2:].mean(0)
            assert shown.shape == (24, 36)
            for row, column in ((0, 0), (1, 3), (2, 4)):
                expected = 17 * query[2 + 5 * row + column]
                np.testing.assert_allclose(shown[8 * row, 8 * column + 3], expected, rtol=1e-4)
            highest = max(highest, shown.max())
        for axis in others:
            np.testing.assert_allclose(axis.images[1].get_clim(), (0, highest), rtol=1e-5)


def test_equal_attention_is_1():
    found = to_patches(np.full((4, 17, 17), 1 / 17), 2, (3, 5), True)
    np.testing.assert_allclose(found, np.ones((4, 3, 5)))


def test_blocks_with_other_tokens_are_refused():
    with pytest.raises(UserError, match="attend among 6 and 17 tokens instead of 17; valid: a mod"):
        draw(IMAGE, [BLOCKS[0], weights(2, 6, 6)], SETTINGS, True, "a")
