"""The first layer for grey images equals timm's."""

import numpy as np
import pytest

from tokenvit_jax.weights.channels import adapt_channels

pytestmark = pytest.mark.parity


def test_kernels_for_one_channel_equal_timms(timm):
    torch = pytest.importorskip("torch")
    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 5)).astype(np.float32)
    theirs = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    theirs = timm.models.adapt_input_conv(1, theirs).numpy().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(adapt_channels(kernel, 1), theirs, rtol=1e-6, atol=1e-6)
