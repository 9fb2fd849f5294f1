"""Short trainings on the embedded digits that watch how groups and selected keys change."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tokenvit_jax.config import dgt_digits_config
from tokenvit_jax.data import dataset_info, eval_dataset, train_dataset
from tokenvit_jax.tasks import classification
from tokenvit_jax.training.optimizer import make_optimizer
from tokenvit_jax.training.parallel import make_parallel
from tokenvit_jax.training.state import eval_variables, init_state
from tokenvit_jax.training.step import make_eval_step, make_train_step, normalize

PROBE_IMAGES = 64
PROBE_EVERY = 10  # steps


class Run(NamedTuple):
    """What one training showed.

    Attributes:
      loss: of every step (num_steps,).
      accuracy: on the test images, at the end.
      churn: part of the queries of fixed images that changed their group in one step, at each
        probe (num_probes,).
      overlap: part of a group's keys that it still selects one step later, at each probe.
      used: part of the groups that have a query, at each probe.
    """

    loss: np.ndarray
    accuracy: float
    churn: np.ndarray
    overlap: np.ndarray
    used: np.ndarray


def hard_digits_config(seed: int) -> ConfigDict:
    """Returns the digits recipe, shorter, and with digits turned and shifted further.

    The plain recipe ends at 99 % whatever the routing does; this one leaves room for differences.
    """
    config = dgt_digits_config("dgt_t")
    config.seed = seed
    config.num_steps = 160
    config.augment.rotation = 40.0
    config.augment.translation = 0.2
    return config


def run_all(settings: dict[str, dict], seeds: tuple[int, ...]) -> dict[str, list[Run]]:
    """Trains with every setting and seed.

    Args:
      settings: name -> entries of the configuration, such as {"centroids.rule": "literal"}.
      seeds: of the configuration.

    Returns:
      name -> one :class:`Run` per seed.
    """
    runs = {name: [] for name in settings}
    for name, entries in settings.items():
        for seed in seeds:
            config = hard_digits_config(seed)
            config.update_from_flattened_dict(entries)
            runs[name].append(run(config))
            print(f"{name}, seed {seed}: test accuracy {runs[name][-1].accuracy:.4f}", flush=True)
    return runs


def run(config: ConfigDict) -> Run:
    """Trains with a configuration and returns what was observed on the way."""
    num_classes = dataset_info(config.dataset).num_classes
    model = classification.make_model(config, num_classes)
    optimizer = make_optimizer(config)
    parallel = make_parallel(config)
    init_fn = functools.partial(init_state, model, optimizer, config)
    state = parallel.init(init_fn)
    train_step = parallel.train_step(
        make_train_step(model, optimizer, config, num_classes), parallel.abstract(init_fn)
    )
    eval_step = parallel.eval_step(make_eval_step(model))
    probe_images = normalize(jnp.asarray(next(iter(eval_dataset(config)))["image"][:PROBE_IMAGES]))

    @jax.jit
    def probe(params, model_state):
        _, found = model.apply(
            {"params": params, **model_state}, probe_images, train=False, mutable=["intermediates"]
        )
        return found["intermediates"]

    loss, churn, overlap, used = [], [], [], []
    for step, batch in zip(range(config.num_steps), iter(train_dataset(config)), strict=False):
        before = probe(state.params, state.model_state) if step % PROBE_EVERY == 0 else None
        state, metrics = train_step(state, batch)
        loss.append(float(metrics["loss"]))
        if before is not None:
            observed = compare(before, probe(state.params, state.model_state))
            for values, value in zip((churn, overlap, used), observed, strict=True):
                values.append(value)

    variables = eval_variables(state.params, state.model_state, state.ema)
    sums = [jax.device_get(eval_step(variables, batch)) for batch in eval_dataset(config)]
    accuracy = classification.mean_metrics(sums)["eval/accuracy"]
    return Run(np.array(loss), accuracy, *map(np.array, (churn, overlap, used)))


def compare(before, after) -> tuple[float, float, float]:
    """Returns churn, overlap and used groups of two probes, averaged over the blocks that select.

    Args:
      before, after: the collection "intermediates" of the same images.
    """
    observed = []
    for old, new in zip(_routings(before), _routings(after), strict=True):
        (old_groups, old_keys), (new_groups, new_keys) = old, new
        length, num_groups = old_groups.shape[-1], old_keys.shape[2]
        selected = [np.eye(length, dtype=bool)[keys].any(-2) for keys in (old_keys, new_keys)]
        kept = (selected[0] & selected[1]).sum(-1) / old_keys.shape[-1]
        present = (new_groups[:, :, None] == np.arange(num_groups)[:, None]).any((0, 3))
        observed.append((np.mean(old_groups != new_groups), kept.mean(), present.mean()))
    return tuple(np.mean(observed, 0))


def _routings(intermediates):
    """Yields groups (B, N, L) and keys (B, N, G, k) of every block that selects among its keys."""
    if "groups" in intermediates:
        groups, keys = (np.asarray(intermediates[name][0]) for name in ("groups", "keys"))
        if keys.shape[-1] < groups.shape[-1]:
            yield groups, keys
        return
    for name in sorted(intermediates):
        yield from _routings(intermediates[name])


def mean_and_spread(values) -> str:
    """Formats the mean and the standard deviation over seeds."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
