"""The command that compiles steps for other devices; here the CPU takes the place of a GPU."""

import copy
import json
import os
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from sampled import sampled

from tokenvit_jax import cli, compile
from tokenvit_jax.ahead import command, compiling, quiet, report, targets
from tokenvit_jax.kernels.platforms import Misfit
from tokenvit_jax.tasks import default_config

GIB = 2**30


def small_config() -> ConfigDict:
    config = default_config("classification")
    config.model = "deit_ti"
    config.model_overrides = ConfigDict(
        {"dim": 8, "depth": 1, "num_heads": 2, "patch_size": 16, "position_size": (32, 32)}
    )
    config.image_size = 32
    config.batch_size = 16
    config.ema_decay = 0.9
    config.optimizer.warmup_steps = 1
    return config


@pytest.fixture(autouse=True)
def cpu_as_gpu(monkeypatch):
    monkeypatch.setattr(targets, "devices_of", lambda target: jax.devices()[: target.num_devices])
    monkeypatch.setattr(targets, "compiler_options", lambda device: {})


@pytest.fixture(scope="module")
def compiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "devices_of", lambda target: jax.devices()[: target.num_devices])
        patch.setattr(targets, "compiler_options", lambda device: {})
        lines = []
        found = command.compile_for(small_config(), "h100", "train", announce=lines.append)
    assert lines == ["compiling the training step for h100: 16 images per device ..."]
    assert (found.largest, found.step) == (None, 1)
    return found.compiled


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["compile", *args])
    with pytest.raises(SystemExit) as exit_info:
        cli.run(compile.main, copy.deepcopy(compile.FLAGS), required=["config", "target"])
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err


def test_flags_name_the_modes_and_formats():
    assert compile.MODES == compiling.MODES
    assert compile.FORMATS == report.FORMATS


def test_training_step(compiled):
    memory, params = compiled.memory, compiled.memory.parameters
    assert params > 0 and params == memory.averages
    assert 2 * params <= memory.optimizer <= 2 * params + 64  # AdamW's moments and counters
    assert memory.batch == 16 * (32 * 32 * 3 + 4 + 4 + 4)
    assert memory.temporaries > 0 and compiled.fits
    assert memory.total == sum(memory) > memory.state > 3 * params
    assert compiled.program.kernels and not compiled.program.collectives
    assert compiled.trace_seconds > 0 and compiled.compile_seconds > 0


def test_reports(compiled):
    text = report.format_report(compiled, "table", None)
    assert text.startswith("Training step on h100\n  1 x NVIDIA H100 SXM, 80 GB; 16 images per dev")
    for part in (
        "Memory of a device\n",
        "parameters",
        "Speed\n",
        "Parts\n",
        "Collectives\n  None.",
    ):
        assert part in text
    parts = text.partition("Parts\n")[2].partition("\n\n")[0].splitlines()
    assert "on 132 multiprocessors at" in parts[0] and parts[1].endswith("bound by")
    assert parts[-1].split()[0] == "all" and parts[-1].split()[-1] in ("launch", "bytes")
    markdown = report.format_report(compiled, "markdown", 32)
    assert "## Memory of a device\n" in markdown and "| --- |" in markdown
    assert "32 images per device are the most that fit with 4% to spare, within 2%." in markdown
    limit = report.format_report(compiled, "table", 4096)
    assert "4096 images per device fit; --fit tries no more." in limit
    found = json.loads(report.format_report(compiled, "json", None))
    assert found["fits"] and found["batch_size"] == 16
    assert found["launches"] == sum(kernel.times for kernel in compiled.program.kernels)
    assert found["memory"]["total"] == compiled.memory.total
    assert sum(part["seconds"] for part in found["parts"]) == pytest.approx(found["floor_seconds"])
    assert sum(found["limits"].values()) == pytest.approx(found["floor_seconds"])
    low, high = (found["images_per_second"][key] for key in ("low", "high"))
    assert low < high < found["images_per_second"]["bound"]


def test_kernels_that_cannot_take_their_arguments_are_listed(compiled):
    misfit = Misfit("attention", "cuda", "head dim 20 is not a multiple of 8", ((2, 4, 20),))
    text = report.format_report(compiled._replace(misfits=(misfit,)), "table", None)
    assert "head dim 20 is not a multiple of 8" in text and "(2, 4, 20)" in text


def test_a_step_that_does_not_fit(compiled, monkeypatch, capsys):
    large = compiled.memory._replace(parameters=10 * GIB, temporaries=100 * GIB)
    tight = compiled._replace(memory=large)
    monkeypatch.setattr(command, "compile_step", lambda *args: tight)
    line = ("--config=dgt_t:digits", "--target=h100", "--batch_per_device=16")
    status, out, err = run(monkeypatch, capsys, *line)
    assert status == 1
    assert "DOES NOT FIT: 110." in out
    assert "error: a batch of 16 images per device does not fit into the memory: a step" in err
    assert "50.65 GiB too much; about 7 images per device would fit (--fit finds the " in err
    # A TPU's compiler gives no program.
    monkeypatch.setattr(command, "compile_step", lambda *args: tight._replace(program=None))
    status, out, _ = run(monkeypatch, capsys, *line, "--format=json")
    assert status == 1 and json.loads(out)["estimated_largest_batch_per_device"] == 7
    huge = tight._replace(memory=large._replace(parameters=90 * GIB))
    assert "no batch would; shard the state with --config.mesh.fsdp" in report.excess(huge, 1)


def test_fit(compiled, monkeypatch, capsys):
    def compile_step(config, target, mode, batch):
        assert config.batch_size == 1024 and target.name == "h100"
        memory = compiling.Memory(parameters=GIB, temporaries=batch * GIB // 4)
        return compiled._replace(memory=memory, batch_per_device=batch)

    monkeypatch.setattr(command, "compile_step", compile_step)
    line = ("--config=dgt_t", "--target=h100", "--batch_per_device=64", "--fit")
    status, out, err = run(monkeypatch, capsys, *line)
    assert status == 0
    assert "222 images per device are the most that fit" in out  # of 59.35 GiB
    assert err.count("compiling the training step") <= 3


def test_a_block_that_half_of_the_memory_cannot_hold(monkeypatch):
    calls = []

    class Lowered:
        def compile(self, compiler_options=None):
            calls.append(compiler_options)
            if compiler_options:
                raise jax.errors.JaxRuntimeError("Ran out of memory in memory space vmem while ...")
            return jax.jit(lambda x: x + 1).lower(1.0).compile()

    options = {"xla_tpu_scoped_vmem_limit_kib": 1}
    monkeypatch.setattr(targets, "compiler_options", lambda device: dict(options))
    target = targets.parse_target("v5e")
    assert compiling._compile(Lowered(), target, compiling.Memory())[1] is not None
    assert calls == [options, None]


def test_messages_of_a_compiler_without_memory():
    arguments = compiling.Memory(parameters=GIB)
    error = RuntimeError("total memory required for HLO temporaries (32.00G) exceeds available")
    assert compiling._missing_memory(error, arguments) == 32 * GIB
    error = RuntimeError("Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.")
    assert compiling._missing_memory(error, arguments) == 19.5 * GIB
    with pytest.raises(RuntimeError, match="another"):
        compiling._missing_memory(RuntimeError("another"), arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target=h10"], "--target=h10 is not valid (did you mean 'h100'?); valid: a100, h100"),
        (["--target=h100x0"], "--target=h100x0 is not valid; valid: h100, h100x2 to"),
        (["--target=h100x3"], "config.batch_size=1024 is not a multiple of 3 devices"),
        (
            ["--target=v5e:3x5"],
            "--target=v5e:3x5 is not valid; valid: v5e, v5e:2x2 or a part",
        ),
        (
            ["--target=h100", "--batch_per_device=0"],
            "--batch_per_device=0 is not valid; valid: ",
        ),
        (["--target=h100", "--batch_per_device=3"], "an odd number of images"),
        (["--target=h100", "--config.mesh.fsdp=3"], "config.mesh.fsdp=3 does not divide"),
        (["--target=h100", "--config.model=dgt"], "unknown model 'dgt'"),
        ([], "--target is missing"),
    ],
)
def test_bad_input(arguments, message, monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, "--config=dgt_t", *arguments)
    assert status in (1, 2) and not out
    assert message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
@pytest.mark.parametrize("mode", sampled(["train", "evaluate", "predict"]))
def test_steps_lower_from_shapes_alone(parallel, mode):
    config = small_config()
    config.parallel = parallel
    config.data.eval_batch_size = 16
    step = compiling.make_step(config, jax.devices()[:2], mode)
    lowered = step.function.lower(*step.arguments)
    assert "stablehlo" in lowered.as_text()[:10_000] or "module @" in lowered.as_text()[:1000]
    per_device = 8 * 32 * 32 * 3
    assert per_device <= step.memory.batch <= per_device + 8 * 16
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(step.arguments))


def test_a_teacher_is_not_read():
    config = small_config()
    config.distillation.weight, config.distillation.teacher = 0.5, "nowhere"
    step = compiling.make_step(config, jax.devices()[:1], "train")
    logits = step.arguments[1]["teacher_logits"]
    assert (logits.shape, logits.dtype) == ((16, 10), np.float32)


def test_alarms_of_a_slow_compiler_are_dropped(capfd):
    with quiet.without_alarms():
        os.write(2, b"E1127 17:29:50 9586 slow_operation_alarm.cc:140] took 2m\n\n")
        os.write(2, b"*" * 32 + b"\n[Compiling module jit_step for GPU] Very slow compile?\n")
        os.write(2, b"another line\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "another line\nafter\n"
