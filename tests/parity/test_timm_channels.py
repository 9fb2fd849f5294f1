"""The first layer for other numbers of channels equals timm's."""

import numpy as np
import pytest

from tokenvit_jax.weights.channels import adapt_channels

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_kernels_equal_timms(channels):
    torch = pytest.importorskip("torch")
    manipulate = pytest.importorskip("timm.models._manipulate")
    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 5)).astype(np.float32)
    theirs = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    theirs = manipulate.adapt_input_conv(channels, theirs).numpy().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(adapt_channels(kernel, channels), theirs, rtol=1e-6, atol=1e-6)
