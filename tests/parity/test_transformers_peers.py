"""In a benchmark, networks of transformers do the same work as ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax import benchmark
from tokenvit_jax.errors import UserError
from tokenvit_jax.measure import torch_peers, transformers_peers
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.tasks.depth.losses import silog

pytestmark = pytest.mark.parity

SIZE = (64, 64)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Runs PyTorch in one thread: waiting threads stall small models next to other processes."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    before = torch.get_num_threads()
    monkeypatch.setattr(torch_peers.os, "sched_getaffinity", lambda pid: {0})
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Parameters that theirs has in addition: the LayerNorm behind the backbone and, in DPT, the unit of
# the coarsest fusion that nothing reads; its table of positions is that of these images.
@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("segmentation", 2 * 768),
        ("depth", 2 * 768 + 2 * (9 * 256 + 1) * 256 - (24 * 24 - 4 * 4) * 768),
        ("masks", 2 * 768),
        ("pose", 2 * 768),
    ],
)
def test_networks_have_equal_parameters(task, more):
    measured = benchmark.MEASURED[task]
    work = transformers_peers.transformers_work(measured.peer, SIZE, "train")
    images = jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32)
    ours = variable_shapes(benchmark._task_kind(task).model(measured.model), images)["params"]
    theirs = sum(p.numel() for p in work.module.parameters())
    assert theirs - sum(np.prod(x.shape) for x in jax.tree.leaves(ours)) == more


def test_loss_of_depth_is_that_of_the_task():
    import torch

    work = transformers_peers.transformers_work("dpt_hybrid", SIZE, "train")
    depth = work.targets(2, torch.Generator().manual_seed(0))
    assert depth.shape == (2, *SIZE) and depth.min() > 0 and depth.max() < 10
    y = 1000 * torch.rand(2, *SIZE)

    class Output:
        predicted_depth = y

    found = work.loss(lambda images: Output, None, depth)
    ours = silog(1 / (0.000305 * jnp.asarray(y.numpy()) + 0.1378), jnp.asarray(depth.numpy()))
    assert float(found) == pytest.approx(float(ours.mean()), rel=1e-4)


def test_training_adds_the_auxiliary_head():
    work = transformers_peers.transformers_work("upernet_swin_t", SIZE, "train")
    assert work.module.auxiliary_head is not None
    forward = transformers_peers.transformers_work("upernet_swin_t", SIZE, "forward")
    assert forward.module.auxiliary_head is None
    with pytest.raises(UserError, match=r"--batch_size=1 is too small .* valid: from 2"):
        torch_peers.torch_peer(work, SIZE, 1, "float32", "train")


def test_images_that_a_network_does_not_take():
    with pytest.raises(UserError, match=r"^dpt_hybrid does not take 64x96 images: "):
        transformers_peers.transformers_work("dpt_hybrid", (64, 96), "forward")
