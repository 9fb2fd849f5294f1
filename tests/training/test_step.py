import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from make_task import make_task
from small_model import BATCH_SIZE, NUM_CLASSES, SmallModel, random_batch, small_config

from tokenvit_jax.errors import UserError
from tokenvit_jax.layers import advance_centroids
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.state import eval_variables, init_state
from tokenvit_jax.training.step import make_eval_step, make_train_step


@functools.cache
def initial(has_batch_norm=True):
    model = SmallModel(has_batch_norm=has_batch_norm, drop_path=0.0)
    config = small_config()
    config.ema_decay = 0.9
    return jax.jit(functools.partial(init_state, model, make_optimizer(config), config))()


def normalize(images, normalization="imagenet"):
    config = small_config()
    config.data.normalization = normalization
    return make_task(config).normalize(images)


def one_step(model, config, state, batch=None):
    step = make_train_step(make_task(config, NUM_CLASSES), model, make_optimizer(config))
    return jax.jit(step)(state, batch or random_batch(0))


def assert_trees_close(found, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected
    )


def test_accumulated_micro_batches_equal_the_full_batch():
    model = SmallModel(has_batch_norm=False, drop_path=0.0)
    state = initial(has_batch_norm=False)
    config = small_config()
    full = one_step(model, config, state)
    config.accumulate_steps = 4
    parts = one_step(model, config, state)
    # Adam divides by the gradient's size: compare its moments, not the parameters alone.
    assert_trees_close(parts[0], full[0])
    assert_trees_close(parts[1], full[1])
    assert float(full[1]["grad_norm"]) > 0


@pytest.mark.parametrize("accumulate_steps", [1, 4])
def test_centroids_move_once_per_step_by_the_sums_of_the_whole_batch(accumulate_steps):
    model = SmallModel(has_batch_norm=False, drop_path=0.0, old_weight=0.7)
    state = initial(has_batch_norm=False)
    config = small_config()
    config.accumulate_steps = accumulate_steps
    found = one_step(model, config, state)[0].model_state["centroids"]

    images = normalize(random_batch(0)["image"], "imagenet")
    variables = {"params": state.params, **state.model_state}
    apply = jax.jit(functools.partial(model.apply, train=True, mutable=["centroids"]))
    _, updates = apply(variables, images)
    expected = advance_centroids(updates["centroids"], 0.7)
    assert_trees_close(found, expected)
    before = state.model_state["centroids"]["attention"]["centroids"]
    assert np.abs(found["attention"]["centroids"] - before).max() > 1e-3
    np.testing.assert_array_equal(found["attention"]["counts"], 0)


def test_batch_statistics_and_averages_follow_the_step():
    model = SmallModel(drop_path=0.0)
    state = initial()
    config = small_config()
    config.ema_decay = 0.9
    after = one_step(model, config, state)[0]
    assert_trees_close(
        after.ema["params"],
        jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state.params, after.params),
    )
    old, new = state.model_state["batch_stats"], after.model_state["batch_stats"]
    assert_trees_close(
        after.ema["batch_stats"], jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, old, new)
    )
    assert np.abs(new["norm"]["mean"] - old["norm"]["mean"]).max() > 0
    variables = eval_variables(after.params, after.model_state, after.ema)
    assert variables["params"] is after.ema["params"]
    assert variables["centroids"] is after.model_state["centroids"]


def test_metrics_of_a_step():
    model = SmallModel(drop_path=0.0)
    state, config, batch = initial(), small_config(), random_batch(0)
    config.label_smoothing = 0.1
    config.optimizer.warmup_steps = 5
    config.optimizer.warmup_learning_rate = 1e-3
    after, metrics = one_step(model, config, state, batch)

    def loss_fn(params):
        variables = {"params": params, **state.model_state}
        images = normalize(batch["image"], "imagenet")
        logits, _ = model.apply(variables, images, train=True, mutable=list(state.model_state))
        targets = 0.9 * np.eye(NUM_CLASSES)[batch["label"]] + 0.1 / NUM_CLASSES
        return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(state.params)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.global_norm(grads)), rel=1e-4)
    assert float(metrics["learning_rate"]) == pytest.approx(1e-3)
    assert int(metrics["data/skipped"]) == batch["skipped"].sum() == int(after.skipped)
    assert int(after.step) == 1


def test_steps_draw_new_random_numbers():
    model = SmallModel(drop_path=0.5, old_weight=1.0)
    config = small_config()
    config.optimizer.learning_rate = config.optimizer.warmup_learning_rate = 0.0
    config.optimizer.end_learning_rate = 0.0
    step = jax.jit(make_train_step(make_task(config, NUM_CLASSES), model, make_optimizer(config)))
    state, batch = initial(), random_batch(0)
    first, metrics = step(state, batch)
    _, again = step(state, batch)
    _, second = step(first, batch)
    assert float(metrics["loss"]) == float(again["loss"])
    assert float(metrics["loss"]) != float(second["loss"])


@pytest.mark.parametrize(
    ("normalization", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("inception", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_pixels_are_normalised(normalization, mean, std):
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(2, 8, 16, 3)
    found = normalize(jnp.asarray(images), normalization)
    np.testing.assert_allclose(found, (images / 255.0 - mean) / std, rtol=1e-5, atol=1e-6)


def test_unknown_normalization_is_named():
    message = r"config\.data\.normalization='half' is not valid; valid: imagenet, inception"
    with pytest.raises(UserError, match=message):
        normalize(jnp.zeros((1, 2, 2, 3), jnp.uint8), "half")


def test_evaluation_counts_every_image_once_and_no_padding():
    model = SmallModel()
    state = initial()
    variables = eval_variables(state.params, state.model_state)
    batch = random_batch(0)
    batch["mask"] = (np.arange(BATCH_SIZE) < 11).astype(np.float32)
    batch["image"][11:] = 255
    task = make_task(small_config(), NUM_CLASSES)
    outcome = jax.jit(make_eval_step(task, model))(variables, batch)
    images = normalize(batch["image"], "imagenet")
    logits = jax.jit(functools.partial(model.apply, train=False))(variables, images)[:11]
    labels = batch["label"][:11]
    meter = task.meter()
    meter.add(outcome)
    meter.add(outcome)
    metrics = meter.result()
    assert metrics["eval/accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).mean()))
    assert "eval/accuracy_top5" not in metrics  # there are five classes
    correct = np.asarray(logits.argmax(-1) == labels)
    expected = [correct[labels == k].mean() if k in labels else np.nan for k in range(NUM_CLASSES)]
    np.testing.assert_allclose(meter.per_class()["accuracy"], expected)
    losses = -jax.nn.log_softmax(logits)[jnp.arange(11), labels]
    assert metrics["eval/loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
