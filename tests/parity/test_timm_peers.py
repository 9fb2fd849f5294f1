"""In a benchmark, timm models do the same work as ours and count multiply-adds equally."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax.errors import UserError
from tokenvit_jax.measure import models, timm_peers, torch_peers
from tokenvit_jax.measure.timing import MIN_CALLS
from tokenvit_jax.models.backbone import Trainable

pytestmark = pytest.mark.parity

SIZE = (32, 40)


@pytest.fixture(autouse=True)
def one_thread(timm, monkeypatch):
    """Runs PyTorch in one thread: waiting threads stall small models next to other processes."""
    import torch

    before = torch.get_num_threads()
    monkeypatch.setattr(torch_peers.os, "sched_getaffinity", lambda pid: {0})
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_peer(name, image_size, batch_size, dtype, mode):
    work = timm_peers.timm_work(name, image_size, mode)
    return torch_peers.torch_peer(work, image_size, batch_size, dtype, mode)


@pytest.fixture
def linear(monkeypatch):
    """Replaces timm's models with one linear layer that records its calls."""
    import torch

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3 * SIZE[0] * SIZE[1], 1000)
            self.noted = []

        def forward(self, images):
            logits = self.layer(images.flatten(1))
            inference = torch.is_inference_mode_enabled()
            self.noted.append((self.training, inference, logits.dtype, len(images)))
            return logits

    model = Linear()
    monkeypatch.setattr(timm_peers, "_create", lambda name, image_size: model)
    return model


@pytest.mark.parametrize(
    ("name", "gmacs"), [("swin_tiny_patch4_window7_224", 4.5), ("pvt_v2_b2", 4.0)]
)
def test_multiply_adds_are_the_published_ones(name, gmacs):
    torch, _ = torch_peers.import_package("timm")
    model = timm_peers._create(name, (224, 224))
    macs = torch_peers.count_torch_macs(model, torch.zeros(1, 3, 224, 224))
    assert round(macs / 1e9, 1) == gmacs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward(linear, dtype):
    import torch

    peer = make_peer("linear", SIZE, 2, dtype, "forward")
    assert peer.macs == 3 * SIZE[0] * SIZE[1] * 1000
    before = [p.clone() for p in linear.parameters()]
    linear.noted.clear()
    peer.call().block_until_ready()
    assert linear.noted == [(False, True, getattr(torch, dtype), 2)]
    for old, parameter in zip(before, linear.parameters(), strict=True):
        assert torch.equal(old, parameter) and parameter.dtype == torch.float32


def test_training_step_is_gradient_descent(linear):
    import torch

    peer = make_peer("linear", SIZE, 2, "float32", "train")
    linear.noted.clear()
    weight, bias = (p.detach().numpy().astype(np.float64) for p in linear.parameters())
    peer.call()
    assert linear.noted == [(True, False, torch.float32, 2)]
    assert all(p.grad is None for p in linear.parameters())  # the next step starts anew

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 3, *SIZE, generator=generator).flatten(1).numpy().astype(np.float64)
    labels = torch.randint(1000, (2,), generator=generator).numpy()
    logits = inputs @ weight.T + bias
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    d_logits = (probs - np.eye(1000)[labels]) / 2
    found_weight, found_bias = (p.detach().numpy() for p in linear.parameters())
    # The change of a weight is about 1e-3, small compared to the weight: compare the changes.
    np.testing.assert_allclose(found_weight - weight, -1e-3 * d_logits.T @ inputs, atol=1e-8)
    np.testing.assert_allclose(found_bias - bias, -1e-3 * d_logits.sum(0), atol=1e-8)


def test_takes_turns_with_our_models(monkeypatch):
    class MeanModel(Trainable):
        @nn.compact
        def __call__(self, images, train):
            return nn.Dense(1000)(images.mean((1, 2)))

    monkeypatch.setattr(models, "create_model", lambda name, dtype: MeanModel())
    rows = models.benchmark_models(
        ["mean"], SIZE, 2, jnp.dtype("float32"), ["train"], against=["pvt_v2_b0"]
    )
    assert [row["model"] for row in rows] == ["mean", "timm/pvt_v2_b0"]
    ours, peer = rows
    ratio = ours["gmacs_per_second"] / peer["gmacs_per_second"]
    assert (ours["ratio_to_pvt_v2_b0"], peer["ratio_to_pvt_v2_b0"]) == (ratio, 1)
    assert ours.keys() == peer.keys() and peer["compile_seconds"] is None
    assert peer["calls"] >= MIN_CALLS


def test_threads_are_those_of_jax(monkeypatch):
    import torch

    for cpus in ({0}, {0, 1, 5}):
        monkeypatch.setattr(torch_peers.os, "sched_getaffinity", lambda pid, cpus=cpus: cpus)
        found = torch_peers.environment("timm")
        assert found["torch threads"] == len(cpus)
        assert found["torch mode"] == "eager" and found["torch"] == torch.__version__


def test_mistakes(monkeypatch):
    with pytest.raises(UserError, match=r"no model 'pvt_v2_b' \(did you mean 'pvt_v2_b\d'"):
        make_peer("pvt_v2_b", SIZE, 1, "float32", "forward")
    with pytest.raises(UserError, match=r"nest_tiny does not take 32x40 images: .*square"):
        make_peer("nest_tiny", SIZE, 1, "float32", "forward")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(UserError, match="JAX uses the tpu, which this PyTorch does not"):
        torch_peers.torch_device()


def test_import_beside_a_torchvision_whose_operators_do_not_load():
    # In a new process: in this one torchvision is imported already, with stubs for what it lacks.
    code = "from tokenvit_jax.measure import torch_peers; torch_peers.import_package('timm')"
    subprocess.run([sys.executable, "-c", code], check=True)
