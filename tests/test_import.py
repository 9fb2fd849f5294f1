"""Imports load heavy packages only where they are needed."""

import json
import subprocess
import sys

import pytest
from sampled import sampled

NEVER = {"tensorflow", "torch", "timm", "sklearn"}
LATE = {"tensorboardX"}  # imports torch; loaded by the first log, while workers start
# Training and data need these; models, operators and benchmarks do not.
NOT_FOR_MODELS = {"grain", "orbax", "tensorflow_datasets", "tensorstore", "cv2", "matplotlib"}
# A machine for benchmarks has only jax, flax and numpy.
NOT_FOR_BENCHMARKS = NOT_FOR_MODELS | {"optax", "ml_collections", "chex", "PIL", "tqdm"}


def loaded_by(module):
    """Imports a module in a new process.

    Returns:
      The top-level packages that are loaded afterwards, and the seconds that the import takes once
      jax and flax are imported.
    """
    code = (
        "import sys, time, json, jax, flax.linen; start = time.perf_counter(); "
        f"import {module}; seconds = time.perf_counter() - start; "
        "print(json.dumps([sorted({name.split('.')[0] for name in sys.modules}), seconds]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages, seconds = json.loads(done.stdout)
    return set(packages), seconds


def test_package():
    packages, seconds = loaded_by("tokenvit_jax")
    assert "tokenvit_jax" in packages
    assert not packages & (NEVER | NOT_FOR_MODELS)
    assert seconds < 2


@pytest.mark.parametrize("module", sampled(["benchmark", "summary"]))
def test_commands_that_need_jax_and_flax_only(module):
    packages, _ = loaded_by(f"tokenvit_jax.{module}")
    assert not packages & (NEVER | NOT_FOR_BENCHMARKS)


@pytest.mark.parametrize("module", sampled(["train", "evaluate", "predict", "prepare"]))
def test_commands_need_no_tensorflow_and_no_torch(module):
    packages, _ = loaded_by(f"tokenvit_jax.{module}")
    assert not packages & (NEVER | LATE)
