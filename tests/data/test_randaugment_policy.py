import numpy as np
import pytest
from PIL import Image

from tokenvit_jax.data import randaugment as module
from tokenvit_jax.data.randaugment import OPERATIONS, apply_operation, randaugment

FILL = (124, 116, 104)


@pytest.fixture(scope="module")
def image():
    corners = np.array([[[0, 40, 90], [60, 90, 10]], [[80, 20, 30], [250, 210, 180]]], np.uint8)
    return np.asarray(Image.fromarray(corners).resize((32, 24), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_size_and_grow_with_the_level(image, name):
    distances = []
    for level in (0.0, 4.0, 9.0):
        result = apply_operation(image, name, level, 1, FILL)
        assert (result.shape, result.dtype) == (image.shape, np.uint8)
        distances.append(np.abs(result.astype(int) - image).mean())
    if name in ("auto_contrast", "equalize", "invert"):
        assert len(set(distances)) == 1  # these operations have no level
    elif name == "posterize":
        assert distances[0] < distances[1] < distances[2]  # 4, 3, 1 bits kept
    else:
        assert distances[0] == 0 and 0 < distances[1] < distances[2]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_grey_images_and_of_alpha(image, name):
    grey = apply_operation(image[..., :1].copy(), name, 7.0, 1, (110,))
    assert (grey.shape, grey.dtype) == ((24, 32, 1), np.uint8)
    colors = apply_operation(image, name, 7.0, 1, FILL)
    alpha = 255 if name in module._MOVES else 90
    shown = np.concatenate([image, np.full((24, 32, 1), alpha, np.uint8)], axis=-1)
    found = apply_operation(shown, name, 7.0, 1, (*FILL, 255))
    assert (found.shape, found.dtype) == ((24, 32, 4), np.uint8)
    assert (found[..., 3] == alpha).all()
    assert np.abs(found[..., :3].astype(int) - colors).max() <= 1


def test_strongest_posterize_is_black(image):
    assert not apply_operation(image, "posterize", 10.0, 1, FILL).any()


def test_policy_draws_level_sign_and_probability(image, monkeypatch):
    calls = []

    def record(image, part, sign, fill):
        calls.append((part, sign))
        assert fill == FILL
        return image

    monkeypatch.setattr(module, "OPERATIONS", {"record": record})
    rng = np.random.default_rng(0)
    for _ in range(2000):
        randaugment(image, rng, num_ops=2, magnitude=9.0, magnitude_std=0.5, fill=FILL)

    parts, signs = np.transpose(calls)
    assert abs(len(calls) / 4000 - 0.5) < 0.04  # five standard errors
    assert abs(np.mean(signs)) < 0.1 and set(signs) == {-1, 1}
    assert parts.max() == 1.0 and (parts == 1.0).mean() < 0.05  # cut at 10
    assert abs(np.median(parts) - 0.9) < 0.01 and abs(parts.std() - 0.049) < 0.005


def test_every_operation_is_drawn(image, monkeypatch):
    drawn = set()

    def recorder(name):
        return lambda image, part, sign, fill: drawn.add(name) or image

    monkeypatch.setattr(module, "OPERATIONS", {name: recorder(name) for name in OPERATIONS})
    randaugment(
        image, np.random.default_rng(0), num_ops=300, magnitude=9.0, magnitude_std=0.5, fill=FILL
    )
    assert drawn == set(OPERATIONS)
