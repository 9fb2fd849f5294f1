"""The training step that the benchmark times."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stateful_model import StatefulModel

from tokenvit_jax.measure.models import train_step_of


def test_training_step_is_gradient_descent():
    model = StatefulModel()
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 6, 4)), jnp.float32)
    labels = jnp.arange(4)
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images)

    def loss_fn(params):
        rest = {key: value for key, value in variables.items() if key != "params"}
        logits, _ = model.apply({"params": params, **rest}, images, train=True, mutable=list(rest))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(variables["params"])
    after, found = jax.jit(train_step_of(model))(variables, images, labels)
    assert found == pytest.approx(float(loss), rel=1e-5)
    expected = jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], grads)
    chex.assert_trees_all_close(after["params"], expected, atol=1e-6)
    # The statistics and centroids also moved, and the sums for the centroids are cleared.
    for name in ("batch_stats", "centroids"):
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), variables[name], after[name])
        assert any(jax.tree.leaves(changed))
    assert not after["centroids"]["DynamicGroupAttention_0"]["sums"].any()
