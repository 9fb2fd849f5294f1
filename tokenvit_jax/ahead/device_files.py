"""Reads the facts about the kinds of devices that programs can be compiled for.

Every file of `devices/` is about one kind; the name of the file is the name of the kind. The first
GPU and the first TPU, `h100.toml` and `v5e.toml`, explain the entries.
"""

import functools
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenvit_jax.ahead.ptx import PIPES
from tokenvit_jax.errors import UserError, did_you_mean
from tokenvit_jax.kernels.gpus import Gpu
from tokenvit_jax.valid import Form, Number, OneOf, Rule, Several, Text, check, whole

FOLDER = Path(__file__).parent / "devices"
_GIB = 2**30


class Fact(NamedTuple):
    """A number or several, and where they come from."""

    value: Any
    source: str


class Device(NamedTuple):
    """The facts of a kind of device; the files in `devices/` say more about each.

    Attributes:
      name: name of the file, such as "h100".
      title: full name.
      platform: "cuda" or "tpu".
      facts: the facts by name.
      products: precision -> operations per second of matrix products and convolutions.
      lanes: pipe, one of `ptx.PIPES` -> instructions of threads that a multiprocessor of a GPU
        executes in a cycle; empty for a TPU.
      host: number of devices in a host; TPUs: along each axis.
      largest: number of devices in the largest target, likewise.
      usable: share of the memory that JAX can use.
      compiler: options of the topology for the compiler.
    """

    name: str
    title: str
    platform: str
    facts: Mapping[str, Fact]
    products: Mapping[str, Fact]
    lanes: Mapping[str, Fact]
    host: tuple[int, ...]
    largest: tuple[int, ...]
    usable: float
    compiler: Mapping[str, Any]

    @property
    def memory(self) -> int:
        """Memory that JAX can use [bytes]."""
        return int(self.usable * self.facts["memory_gib"].value * _GIB)

    @property
    def multiprocessors(self) -> int:
        """Number of multiprocessors of a GPU."""
        return int(re.search(r"core_count: (\d+)", self.compiler["target_config"])[1])

    @property
    def gpu(self) -> Gpu | None:
        """The GPU as the compiler's options describe it; None for a TPU."""
        if self.platform != "cuda":
            return None
        config = self.compiler["target_config"]
        kind = re.search(r'device_description_str: "([^"]*)"', config)[1]
        capability = _version(config, "cuda_compute_capability")
        major, minor, patch = _version(config, "dnn_version_info")
        return Gpu(kind, capability, 10_000 * major + 100 * minor + patch)


def _version(config: str, name: str) -> tuple[int, ...]:
    """Returns the numbers of a version in the options of the compiler."""
    return tuple(map(int, re.findall(r"\d+", re.search(rf"{name} {{([^}}]*)}}", config)[1])))


def list_devices() -> list[str]:
    """Returns the names of the kinds of devices."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


@functools.cache
def read_device(name: str) -> Device:
    """Returns the facts of a kind of device, one of :func:`list_devices`.

    Raises:
      UserError: the file is no TOML, or an entry is missing, unknown or not valid.
    """
    path = FOLDER / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no TOML: {error}") from error
    _check(path, content)
    products, lanes = (
        {key: Fact(**fact) for key, fact in content.pop(table, {}).items()}
        for table in ("products", "lanes")
    )
    plain = ("title", "platform", "usable", "compiler")
    settings = {key: content.pop(key) for key in plain if key in content}
    sides = {key: tuple(content.pop(key)) for key in ("host", "largest")}
    facts = {key: Fact(**fact) for key, fact in content.items()}
    return Device(name=name, facts=facts, products=products, lanes=lanes, **settings, **sides)


# ------------------------------------------------------------------------------------------------
# Valid entries
# ------------------------------------------------------------------------------------------------

_SOURCE = Text(empty=False)
_POSITIVE = Number(0, above=True)
_SHARE = Number(0, 1, above=True)
_FACTS = {
    "memory_gib": _POSITIVE, "bandwidth": _POSITIVE, "launch": Number(0), "latency": Number(0),
    "interconnect": _POSITIVE,
}  # fmt: skip
_GPU_FACTS = {"network": _POSITIVE, "clock": _POSITIVE}
_OPTIONAL = {"reached": Several(_SHARE, 2, ascending=True)}
_PRODUCTS = ("bfloat16", "default", "float32")
_COMPILER = Form(
    r'(?s)(?=.*core_count: \d)(?=.*device_description_str: ")(?=.*cuda_compute_capability \{)'
    r"(?=.*dnn_version_info \{).*",
    "a text with core_count, cuda_compute_capability, dnn_version_info and device_description_str",
)


def _check(path: Path, content: Mapping[str, Any]) -> None:
    """Raises UserError for the first entry that is not valid."""
    found = dict(_entries(content))
    platform = OneOf(("cuda", "tpu"))
    rules: dict[str, Rule] = {"title": _SOURCE, "platform": platform}
    facts: dict[str, Rule] = dict(_FACTS)
    if content.get("platform") == "cuda":
        facts |= _GPU_FACTS
        facts |= {f"lanes.{pipe}": _POSITIVE for pipe in PIPES}
        rules["compiler.target_config"] = _COMPILER
        axes = 1
    else:
        found = {key: value for key, value in found.items() if not key.startswith("compiler")}
        host = content.get("host")
        axes = 3 if isinstance(host, list) and len(host) == 3 else 2
    sides = Several(whole(1), axes)
    rules |= {"host": sides, "largest": sides, "usable": _SHARE}
    facts |= {f"products.{precision}": _POSITIVE for precision in _PRODUCTS}
    facts |= {name: rule for name, rule in _OPTIONAL.items() if name in content}
    for name, rule in facts.items():
        rules |= {f"{name}.value": rule, f"{name}.source": _SOURCE}
    for name, rule in rules.items():
        if name not in found:
            raise UserError(f"{path}: {name} is missing; valid: {rule}")
        check(f"{path}: {name}", found[name], rule)
    for name in found:
        if name not in rules:
            raise UserError(f"{path}: {name} is unknown{did_you_mean(name, rules)}")


def _entries(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of tables in tables with their dotted names."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
