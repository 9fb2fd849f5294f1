"""Short trainings of a DGT that watch how groups and selected keys change."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import short_runs
from tokenvit_jax.recipes import dgt_digits_config
from tokenvit_jax.tasks.batches import eval_dataset
from tokenvit_jax.training.step import normalize

PROBE_IMAGES = 64
PROBE_EVERY = 10  # steps


class RoutingRun(NamedTuple):
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


def run_all(settings: dict[str, dict], seeds: tuple[int, ...]) -> dict[str, list[RoutingRun]]:
    """Trains a shrunk DGT-T with every setting and seed: see `short_runs.run_all`."""
    make_config = lambda: short_runs.make_hard(dgt_digits_config("dgt_t"))  # noqa: E731
    return short_runs.run_all(make_config, settings, seeds, run)


def run(config: ConfigDict) -> RoutingRun:
    """Trains with a configuration and returns what was observed on the way."""
    images = jnp.asarray(next(iter(eval_dataset(config)))["image"][:PROBE_IMAGES])
    images = normalize(images, config.data.normalization)
    before, observed = None, []

    def watch(model, step, state):
        nonlocal before
        if step % PROBE_EVERY == 1:
            observed.append(compare(before, probe(model, state)))
        elif step % PROBE_EVERY == 0:
            before = probe(model, state)

    compiled = None

    def probe(model, state):
        nonlocal compiled
        compiled = compiled or jax.jit(
            lambda variables: model.apply(
                variables, images, train=False, mutable=["intermediates"]
            )[1]["intermediates"]
        )
        return compiled({"params": state.params, **state.model_state})

    result = short_runs.train(config, watch)
    churn, overlap, used = np.transpose(observed)
    return RoutingRun(result.loss, result.accuracy, churn, overlap, used)


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
