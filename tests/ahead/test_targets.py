"""Targets by name, and the files with the facts about devices."""

import pytest

from tokenvit_jax.ahead import device_files, targets
from tokenvit_jax.ahead.ptx import PIPES
from tokenvit_jax.errors import UserError
from tokenvit_jax.kernels import gpus

NAMES = targets.list_devices()


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_complete(name):
    device = targets.read_device(name)
    needed = {"memory_gib", "bandwidth", "launch", "interconnect", "latency"}
    needed |= {"network", "clock"} if device.platform == "cuda" else set()
    assert needed <= device.facts.keys() <= needed | {"reached"}
    assert device.products.keys() == {"bfloat16", "default", "float32"}
    assert set(device.lanes) == (set(PIPES) if device.platform == "cuda" else set())
    for fact in (*device.facts.values(), *device.products.values(), *device.lanes.values()):
        assert fact.source
    assert 1e9 < device.memory < 2e11
    assert len(device.host) == len(device.largest)
    products = [device.products[key].value for key in ("bfloat16", "default", "float32")]
    assert products == sorted(products, reverse=True) and products[-1] > 1e13
    text = device.compiler.get("target_config", "")
    assert text.count("{") == text.count("}") and bool(text) == (device.platform == "cuda")


def test_gpus_as_the_compiler_sees_them():
    found = {name: targets.read_device(name).gpu for name in NAMES}
    assert found["a100"] == gpus.Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 91200)
    assert found["h100"] == gpus.HOPPER
    assert found["h200"] == gpus.HOPPER._replace(kind="NVIDIA H200")
    assert found["v5e"] is None
    assert targets.read_device("a100").multiprocessors == 108


@pytest.mark.parametrize(
    ("name", "shape", "in_one_host"),
    [
        ("h100", (1,), True), ("h100x3", (3,), True), ("h100x8", (8,), True),
        ("h200x16", (16,), False), ("v5e", (1, 1), True), ("v5e:2x1", (2, 1), True),
        ("v5e:16x16", (16, 16), False), ("v4:4x4x8", (4, 4, 8), False),
    ],
)  # fmt: skip
def test_names(name, shape, in_one_host):
    target = targets.parse_target(name)
    assert (target.name, target.shape, target.in_one_host) == (name, shape, in_one_host)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h10", r"--target=h10 is not valid \(did you mean 'h100'\?\); valid: a100, h100, h200, "),
        ("", "--target= is not valid; valid: a100, "),
        ("H100", "--target=H100 is not valid"),
        ("h100x0", "valid: h100, h100x2 to h100x8, or multiples of 8 to "),
        ("h100x12", "valid: h100, h100x2 to h100x8, or multiples of 8 to "),
        ("h100:8", "valid: h100, h100x2 to h100x8"),
        ("h100x8x2", "valid: h100, h100x2 to h100x8"),
        ("h100x" + "9" * 50, "is not valid; valid: h100, h100x2 to h100x8"),
        (
            "v5e:3x5",
            "valid: v5e, v5e:2x2 or a part of it, or whole hosts: multiples of its",
        ),
        ("v5e:32x16", "up to v5e:16x16"),
        ("v5ex4", "valid: v5e, v5e:2x2 or a part of it"),
        ("v5e-8", "such as v5e:4x4, up to v5e:16x16"),
        ("v4:4x4", "valid: v4, v4:2x2x1 or a part of it"),
    ],
)
def test_what_is_no_target(name, message):
    with pytest.raises(UserError, match=message):
        targets.parse_target(name)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("h100", "jax_plugins.xla_cuda13", "aot-gpu"), ("v5e", "libtpu", "aot-tpu")],
)
def test_a_missing_compiler_is_named(name, package, extra, monkeypatch):
    monkeypatch.setattr(targets, "_is_installed", lambda package: False)
    message = rf"needs {package}; beside the clone: pip install .*\[{extra}\].* jax==0"
    with pytest.raises(UserError, match=message):
        targets.devices_of(targets.parse_target(name))


def test_a_compiler_that_does_not_fit_is_named(monkeypatch):
    def fail(target):
        raise RuntimeError("a version\nmore")

    monkeypatch.setattr(targets, "_is_installed", lambda package: True)
    monkeypatch.setattr(targets, "_topology", fail)
    with pytest.raises(UserError, match=r"h100: the compiler cannot be used \(a version\); its"):
        targets.devices_of(targets.parse_target("h100"))


VALID = (device_files.FOLDER / "h100.toml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("platform = ", "platform ", r"is no TOML: Expected '=' after a key .* \(at line 3"),
        ('"cuda"', '"rocm"', "platform='rocm' is not valid; valid: cuda, tpu"),
        ("host = [8]", "host = 8", "host=8 is not valid; valid: 1 values, each: whole numbers fr"),
        ("usable = 0.75", "usable = 75", "usable=75 is not valid; valid: numbers above 0 to 1"),
        ("usable = 0.75", "", "usable is missing; valid: numbers above 0 to 1"),
        ("3.0e12", "-3e12", r"bandwidth.value=-3000000000000.0 is not valid; valid: numbers above"),
        ("bandwidth =", "bandwith =", "bandwidth.value is missing; valid: numbers above 0"),
        ("[0.58, 0.67]", "[0.67, 0.58]", "reached.value=.* is not valid; valid: 2 ascending val"),
        ("logic =", "logik =", "lanes.logic.value is missing"),
        ('source = "the driver"', "source = 3", "memory_gib.source=3 is not valid"),
        ("core_count", "cores", "compiler.target_config=.* is not valid; valid: a text with core"),
        ("clock =", "klock = 2\nclock =", r"klock is unknown"),
    ],
)
def test_entries_of_a_file_are_checked(old, new, message, tmp_path, monkeypatch):
    monkeypatch.setattr(device_files, "FOLDER", tmp_path)
    device_files.read_device.cache_clear()
    assert VALID.count(old)
    (tmp_path / "rtx4090.toml").write_text(VALID.replace(old, new, 1))
    with pytest.raises(UserError, match=rf"rtx4090.toml.*{message}"):
        targets.parse_target("rtx4090x8")


def test_a_new_device_is_a_new_file(tmp_path, monkeypatch):
    monkeypatch.setattr(device_files, "FOLDER", tmp_path)
    device_files.read_device.cache_clear()
    (tmp_path / "rtx4090.toml").write_text(VALID.replace("H100", "RTX 4090"))
    assert targets.parse_target("rtx4090x2").shape == (2,)
    assert targets.parse_target("rtx4090").device.title.startswith("NVIDIA RTX 4090")
