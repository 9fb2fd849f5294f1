"""Random settings of models and heads: no traceback, no hang, nothing meaningless accepted."""

import collections
import os
import random

import pytest
from random_settings import draw_trial, run_trial

TRIALS = int(os.environ.get("STRESS_TRIALS", 1000))
SEED = 0


@pytest.mark.stress
def test_random_settings():
    rng, outcomes, faults = random.Random(SEED), collections.Counter(), []
    for _ in range(TRIALS):
        trial = draw_trial(rng)
        outcome, fault = run_trial(trial)
        outcomes[outcome] += 1
        if fault:
            values = {name: repr(trial.settings[name])[:200] for name in trial.drawn}
            faults.append(f"{trial.owner} {values}: {fault}")
            print(faults[-1], flush=True)
    print(f"{TRIALS} settings, seed {SEED}: {dict(outcomes)}, {len(faults)} faults")
    assert not faults
