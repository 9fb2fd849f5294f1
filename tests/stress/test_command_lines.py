"""Random command lines: no traceback, no hang, nothing meaningless accepted."""

import os

import pytest
from command_lines import run_lines

TRIALS = int(os.environ.get("STRESS_TRIALS", 1000))
SEED = 0


@pytest.mark.stress
def test_random_command_lines(tmp_path, monkeypatch):
    assert run_lines(SEED, TRIALS, tmp_path, monkeypatch) == []
