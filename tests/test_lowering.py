"""Operators and training steps lower for accelerators on a host without accelerators."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export
from make_task import make_task
from shipped_configs import load_config

from tokenvit_jax import ops
from tokenvit_jax.kernels import cudnn
from tokenvit_jax.models.backbone import variable_shapes
from tokenvit_jax.tasks import default_config
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import init_state
from tokenvit_jax.training.step import make_eval_step, make_train_step

PLATFORMS = ("cuda", "tpu")
# Exported programs with kernels promise nothing for later versions of XLA; these are not kept.
KERNELS = [
    export.DisabledSafetyCheck.custom_call(name)
    for name in ("__gpu$xla.gpu.triton", "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
]


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowers(fn, *args):
    """Asserts that fn lowers for every platform, each in a separate lowering."""
    for platform in PLATFORMS:
        with cudnn.assumed() if platform == "cuda" else contextlib.nullcontext():
            exported = export.export(
                jax.jit(fn), platforms=[platform], disabled_checks=KERNELS
            )(*args)  # fmt: skip
        assert exported.platforms == (platform,)
        assert "func.func public @main" in exported.mlir_module()


def gradient(fn, num_differentiated):
    """Returns the gradient of the sum of squares of the first result of fn."""

    def loss(*args):
        output = fn(*args)
        output = output[0] if isinstance(output, tuple) else output
        return jnp.sum(output.astype(jnp.float32) ** 2)

    return jax.grad(loss, tuple(range(num_differentiated)))


def group_attention(path, top_k):
    return lambda q, k, v, c: ops.group_attention(q, k, v, c, top_k=top_k, path=path)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    ("path", "top_k"), [("dense", 98), ("tiles", 98), ("auto", 1000)], ids=["dense", "tiles", "all"]
)
def test_group_attention(path, top_k, dtype):
    q, centroids = array(2, 196, 2, 32, dtype=dtype), array(2, 48, 32)
    fn = group_attention(path, top_k)
    lowers(fn, q, q, q, centroids)
    lowers(gradient(fn, 3), q, q, q, centroids)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_other_operators(dtype):
    q = array(2, 49, 2, 32, dtype=dtype)
    x, kernel = array(2, 7, 9, 16, dtype=dtype), array(3, 3, 16, dtype=dtype)
    lowers(ops.dot_product_attention, q, q, q)
    lowers(gradient(ops.dot_product_attention, 3), q, q, q)
    lowers(ops.depthwise_conv, x, kernel)
    lowers(gradient(ops.depthwise_conv, 2), x, kernel)
    scale = array(16)
    norm = lambda x, y, scale: ops.add_layer_norm(x, y, scale, scale, epsilon=1e-6)  # noqa: E731
    lowers(norm, x, x, scale)
    lowers(gradient(norm, 3), x, x, scale)
    groups, centroids = array(2, 2, 49, dtype=jnp.int32), array(2, 5, 32)
    lowers(
        lambda c, q, groups: ops.update_centroids(c, q, groups, old_weight=0.9),
        centroids, q, groups,
    )  # fmt: skip
    tokens, scores = array(2, 300, 16, dtype=dtype), array(2, 300)
    lowers(lambda x: ops.cluster_density_peaks(x, 20), tokens)

    def merge(x, scores):
        return ops.merge_tokens(x, ops.cluster_density_peaks(x, 20).assignment, 20, scores)

    lowers(gradient(merge, 2), tokens, scores)
    q = array(2, 14, 14, 2, 32, dtype=dtype)
    lowers(gradient(ops.pale_attention, 3), q, q, q)
    attend = functools.partial(ops.window_attention, window=(7, 7), shift=(3, 3))
    lowers(gradient(attend, 4), q, q, q, array(2, 49, 49))
    initial = array(2, 20, dtype=jnp.int32)

    def expedite(x):
        centers = ops.cluster_superpixels(x, (15, 20), (11, 9))
        return ops.reconstruct_tokens(x, centers, centers)

    lowers(gradient(expedite, 1), tokens)
    lowers(ops.kmedoids, tokens, initial, scores)
    lowers(gradient(lambda x, w, initial: ops.kmeans(x, initial, w), 2), tokens, scores, initial)
    q = array(2, 49, 2, 32, dtype=dtype)
    lowers(gradient(ops.scored_attention, 3), q, q, q)

    def act(q):
        return ops.clustered_attention(q, q, q, ops.hash_clusters(q[:, 1:], 9), 9)

    lowers(gradient(act, 1), q)


@pytest.mark.parametrize("name", ["dgt_t", "dgt_s", "clustr_t", "pale_t"])
def test_training_step(name):
    config = load_config(name)
    # One block per stage at the published widths: the other blocks lower like these.
    config.model_overrides.depths = (1, 1, 1, 1)
    step_lowers(config)


@pytest.mark.parametrize("method", ["weighted_kmedoids", "kmeans", "importance", "evit", "tome"])
def test_training_step_with_a_token_reducer(method):
    config = load_config("deit_s", "pooled")
    config.model_overrides.depth = 2
    config.model_overrides.token_reducer.update({"method": method, "keep": (49, 7), "carry": True})
    step_lowers(config)


def test_training_step_of_a_host_with_windows():
    config = default_config("classification")
    config.model = "swinv2_t"
    # The second block of a stage has shifted windows.
    config.model_overrides = {"depths": (1, 2, 1, 1), "drop_path": 0.1}
    step_lowers(config)


def test_training_step_of_the_search():
    config = load_config("deit_s", "search")
    config.model_overrides.depth = 1
    step_lowers(config)


def test_training_step_and_evaluation_of_a_clustered_segmenter():
    config = load_config("segmenter_ti")
    config.model_overrides.depth = 3
    config.model_overrides.expedite = {
        "alpha": 1, "beta": 2, "clusters": (20, 20), "where": "logits"
    }  # fmt: skip
    step_lowers(config, 512, label=(2, 512, 512))
    task = make_task(config)
    model = task.make_model()
    variables = variable_shapes(model, array(1, 512, 512, 3))
    pair = array(1, 2, dtype=jnp.int32)
    batch = {
        "image": array(1, 600, 700, 3, dtype=jnp.uint8), "image_size": pair,
        "label": array(1, 90, 80, dtype=jnp.uint8), "label_size": pair, "mask": array(1),
    }  # fmt: skip
    lowers(make_eval_step(task, model), variables, batch)


def step_lowers(config, side=224, label=(2,)):
    config.batch_size = 2
    task = make_task(config, 1000)
    model, optimizer = task.make_model(), make_optimizer(config)
    state = jax.eval_shape(lambda: init_state(model, optimizer, config))
    batch = {
        "image": array(2, side, side, 3, dtype=jnp.uint8),
        "label": array(*label, dtype=jnp.int32),
        "skipped": array(2, dtype=jnp.int32),
    }
    lowers(make_train_step(task, model, optimizer), state, batch)
