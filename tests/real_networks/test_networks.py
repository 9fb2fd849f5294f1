"""Trained networks of packages: features equal those of the packages' own graphs on photographs."""

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from experiments.real_networks import networks
from tokenvit_jax.data import mean_and_std
from tokenvit_jax.errors import UserError

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def photographs():
    """Returns the photographs of scikit-learn, and of scikit-image if it is installed."""
    images = list(load_sample_images().images)
    try:
        from skimage import data

        images += [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    except ImportError:
        pass
    side = networks.IMAGE_SIZE
    images = [Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC) for x in images]
    return np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255


def compare(photographs, name, load, file, outputs, atol=1e-4):
    """Compares results of a network; outputs: value in the graph -> method of our model."""
    pytest.importorskip("onnxruntime")
    try:
        (model, variables), path = load(), file()
    except UserError as error:
        pytest.skip(str(error))
    mean, std = mean_and_std(networks.NORMALIZATION[name])
    images = ((photographs - np.array(mean)) / np.array(std)).astype(np.float32)
    expected = networks.package_network(path, {value: value for value in outputs})(images)
    for value, apply in outputs.items():
        found = np.asarray(
            jax.jit(lambda v, x, apply=apply: apply(model.bind(v), x))(variables, images)
        )
        # Most features are far from zero: the tolerance is not met by chance.
        assert np.abs(found).mean() > 100 * atol
        np.testing.assert_allclose(found, expected[value].reshape(found.shape), atol=atol, rtol=0)


def test_vit_s14_dinov2(photographs):
    """The class token and all patches after the last LayerNorm."""

    def normed(model, images):
        return model.norm(model.tokens(images, False))

    outputs = {"/backbone/layernorm/Add_1_output_0": normed}
    compare(photographs, "vit_s14_dinov2", networks.vit_s14_dinov2, networks.vit_s14_file, outputs)


def test_clip_vit_b16(photographs):
    """The embedding of the image."""
    outputs = {"image_embeds": lambda model, images: model(images, False)}
    compare(photographs, "clip_vit_b16", networks.clip_vit_b16, networks.clip_vit_b16_file, outputs)


def test_swin_b(photographs):
    """The pooled features and the logits."""
    outputs = {
        "/swin/pooler/GlobalAveragePool_output_0": lambda model, x: model.pooled(x, False),
        "logits": lambda model, images: model(images, False),
    }
    compare(photographs, "swin_b", networks.swin_b, networks.swin_b_file, outputs)
