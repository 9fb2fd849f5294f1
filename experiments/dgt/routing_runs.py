"""Trains a DGT for a short time and records how its groups and selected keys change."""

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments import runs, short_runs
from tokenvit_jax.recipes.dgt import dgt_digits_config

PROBE_IMAGES = 64
PROBE_EVERY = 10  # steps


class RoutingRun(NamedTuple):
    """Result of one training.

    Attributes:
      loss: training loss of every step (num_steps,).
      accuracy: accuracy on the test images after training.
      churn: share of the queries of fixed images that change their group in one step, at each probe
        (num_probes,).
      overlap: share of a group's keys that it still selects one step later, at each probe.
      used: share of the groups with at least one query, at each probe.
    """

    loss: np.ndarray
    accuracy: float
    churn: np.ndarray
    overlap: np.ndarray
    used: np.ndarray


def run_all(settings: dict[Hashable, dict]) -> dict[Hashable, list[RoutingRun]]:
    """Trains a small DGT-T with every setting and seed; see `short_runs.run_all`."""
    make_config = lambda: short_runs.make_hard(dgt_digits_config("dgt_t"))  # noqa: E731
    return short_runs.run_all(make_config, settings, run)


def run(config: ConfigDict) -> RoutingRun:
    """Trains with a configuration and probes the routing during training."""
    images = runs.test_images(config)[0][:PROBE_IMAGES]
    apply, before, observed = None, None, []

    def watch(model, step, state):
        nonlocal apply, before
        if step % PROBE_EVERY > 1:
            return
        apply = apply or runs.observe(config, model)
        _, noted = apply({"params": state.params, **state.model_state}, images)
        if step % PROBE_EVERY == 0:
            before = noted
        else:
            observed.append(compare(before, noted))

    result = runs.train(config, watch)
    churn, overlap, used = np.transpose(observed)
    return RoutingRun(result.loss, result.accuracy, churn, overlap, used)


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, float, float]:
    """Returns churn, overlap and used groups of two probes, averaged over the blocks with groups.

    Args:
      before: collection "intermediates" of the images.
      after: the collection one step later.
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


def _routings(intermediates: dict[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields groups (B, N, L) and keys (B, N, G, k) of every block that selects among its keys."""
    if "groups" in intermediates:
        groups, keys = (np.asarray(intermediates[name][0]) for name in ("groups", "keys"))
        if keys.shape[-1] < groups.shape[-1]:
            yield groups, keys
        return
    for name in sorted(intermediates):
        yield from _routings(intermediates[name])
