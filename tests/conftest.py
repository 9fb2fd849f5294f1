"""Settings of the test processes."""

import atexit
import copy
import gc
import os
import re
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

# On a CPU: eight virtual devices, so that code for several devices is tested on any machine; and
# quick compilation, which is most of the time that small tests take: without optimisation by LLVM,
# and without emitters of fusions by MLIR, which take three times as long to compile. Before jax is
# imported: it reads this once. `make test-accelerator` takes the devices that jax finds.
if os.environ.get("TOKENVIT_JAX_TEST_ACCELERATOR", "cpu") == "cpu":
    FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
    if version("jaxlib").startswith("0.10."):  # later versions stop at an unknown flag
        FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

# All test processes share what they compile: many tests compile the same small programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


# What is tested without kernels: a CPU would trace them, which takes as long as all the rest, but
# not run them. Tests of kernels call them directly. With kernels, ops/test_op_shapes.py traces
# every operator and models/test_registry.py every model, test_lowering.py lowers operators and
# training steps for GPUs and TPUs, and test_train_command.py trains on eight devices.
WITHOUT_KERNELS = {
    "expediting", "heads", "layers", "measure", "models", "ops", "tasks", "training", "weights",
    "test_benchmark_command.py", "test_configs.py", "test_convert_command.py",
    "test_depth_commands.py", "test_detection_commands.py", "test_mask_commands.py",
    "test_evaluate_command.py", "test_expedite_command.py", "test_expedite_costs.py",
    "test_label_command.py", "test_pose_commands.py", "test_predict_command.py",
    "test_random_command_lines.py", "test_summary_command.py",
}  # fmt: skip
WITH_KERNELS = {
    "test_registry.py", "test_timing.py",
    # What is lowered for accelerators, or compares the default forms with others.
    "test_assignment.py", "test_cudnn.py", "test_depthwise_block.py",
    "test_flash_attention_tpu.py", "test_linear.py", "test_match_boxes.py", "test_op_shapes.py",
    "test_platforms.py", "test_scored_attention.py",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def forms(request):
    """Leaves kernels out of what the tests of a module trace, unless they are about kernels."""
    from tokenvit_jax.kernels import platforms  # after the settings above, which jax reads once

    part = request.path.relative_to(Path(__file__).parent).parts[0]
    if part not in WITHOUT_KERNELS or request.path.name in WITH_KERNELS:
        yield
        return
    with platforms.default_forms():
        yield


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command; returns its exit status, output, and errors without progress."""
    from tokenvit_jax import cli

    def run_command(command, required, **flags):
        monkeypatch.setattr(sys, "argv", ["command", *(f"--{k}={v}" for k, v in flags.items())])
        with pytest.raises(SystemExit) as exit_info:
            cli.run(command.main, copy.deepcopy(command.FLAGS), required=required)
        output = capsys.readouterr()
        errors = re.sub("^(evaluating|predicting): .*\n", "", output.err, flags=re.MULTILINE)
        return exit_info.value.code, output.out, errors

    return run_command


def pytest_ignore_collect(collection_path, config):
    """Leaves out the comparisons with torch unless asked for: its import takes seconds."""
    marks = config.option.markexpr.replace("not parity", "")
    asked = "parity" in marks or any("parity" in x for x in config.args)
    return True if collection_path.name == "parity" and not asked else None


def pytest_collection_finish():
    """Makes the garbage collector ignore the imported objects and run less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
