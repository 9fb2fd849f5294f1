"""In a benchmark, networks of transformers do the same work as ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenvit_jax import benchmark
from tokenvit_jax.errors import UserError
from tokenvit_jax.measure import macs, torch_peers, transformers_peers
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


# Parameters that theirs has in addition: the norm of Swin's classifier, of 2 x 768.
@pytest.mark.parametrize(("task", "more"), [("segmentation", 2 * 768), ("depth", 0)])
def test_networks_have_equal_parameters(task, more):
    measured = benchmark.MEASURED[task]
    work = transformers_peers.transformers_work(measured.peer, SIZE, "train")
    images = jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32)
    ours = variable_shapes(benchmark._task_kind(task).model(measured.model), images)["params"]
    theirs = sum(p.numel() for p in work.module.parameters())
    assert theirs - sum(np.prod(x.shape) for x in jax.tree.leaves(ours)) == more
