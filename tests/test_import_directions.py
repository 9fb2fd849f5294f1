"""Modules import only from layers that their own layer may use, and never in a circle."""

import ast
import graphlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = "tokenvit_jax"
FOLDER = Path(__file__).parent.parent / PACKAGE

COMMANDS = (
    "train evaluate predict label convert expedite export prepare summary benchmark compile list "
    "__main__"
)
BELOW_TASKS = (
    "expediting measure pictures heads metrics weights models data layers ops config published "
    "progress run_lengths valid output errors"
)
BELOW_COMMANDS = (
    f"ahead training recipes tasks {BELOW_TASKS} memory cli config_flag config_keys slurm stopping"
)
# Layer (a folder, or a module outside all folders) -> layers that it may import besides itself.
# Recipes are above tasks, whose default entries they start from.
MAY_IMPORT = {
    **dict.fromkeys(COMMANDS.split(), BELOW_COMMANDS),
    "__init__": "training models ops",
    "ahead": f"training kernels tasks stopping {BELOW_TASKS}",
    "training": f"tasks kernels memory slurm stopping {BELOW_TASKS}",
    "recipes": f"tasks {BELOW_TASKS}",
    "tasks": BELOW_TASKS,
    "expediting": "measure heads models layers ops published progress errors",
    "measure": "heads models layers ops kernels published errors",
    "pictures": "models layers ops errors",
    "weights": "heads models layers ops output errors",
    "heads": "models layers ops valid errors",
    "metrics": "data run_lengths errors",
    "models": "layers ops kernels published valid errors",
    "data": "config output progress run_lengths stopping valid errors",
    "layers": "ops valid errors",
    "ops": "kernels arrays errors",
    "kernels": "arrays errors",
    "arrays": "",
    "config": "valid errors",
    "cli": "config_flag config_keys data failures output streams valid errors",
    "config_flag": "config_keys config valid errors",
    "config_keys": "tasks models config valid errors",
    "failures": "errors",
    "streams": "",
    "memory": "",
    "output": "errors",
    "published": "",
    "progress": "",
    "run_lengths": "",
    "slurm": "errors",
    "stopping": "",
    "worker": "data stopping",
    "valid": "errors",
    "errors": "",
}
# Packages that the mathematics may use, besides the standard library.
PACKAGES = {layer: {"jax", "numpy", "jaxtyping"} for layer in ("ops", "kernels", "arrays")}
# Modules of `ops` that the kernels may use, too: a layer below both.
ARRAYS = {f"{PACKAGE}.ops.{name}" for name in ("dtypes", "gather")}


# ------------------------------------------------------------------------------------------------
# The check: sources are a dict of module names and texts
# ------------------------------------------------------------------------------------------------


def read_sources(folder: Path) -> dict[str, str]:
    """Returns the sources of a package; a folder's `__init__.py` has the name of the folder."""
    sources = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder.parent).with_suffix("").parts
        sources[".".join(part for part in parts if part != "__init__")] = file.read_text()
    return sources


def imports_of(source: str, modules: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """Yields the modules that a source imports anywhere, also inside functions, and the lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield submodule if submodule in modules else base, node.lineno


def layer_of(module: str) -> str:
    """Returns the name of a module below the package, "__init__" for the package itself."""
    if module in ARRAYS:
        return "arrays"
    return f"{module}.__init__".split(".")[1]


def wrong_imports(sources: Mapping[str, str]) -> list[str]:
    """Returns a line for every import that is forbidden in its layer."""
    found = []
    for module, source in sources.items():
        layer = layer_of(module)
        allowed = {layer, *MAY_IMPORT[layer].split()} if layer in MAY_IMPORT else set()
        allowed |= {"arrays"} if "ops" in allowed else set()
        for target, line in imports_of(source, sources):
            package = target.split(".")[0]
            if package == PACKAGE:
                wrong = layer_of(target) not in allowed
            else:
                packages = PACKAGES.get(layer, {package}) | sys.stdlib_module_names
                wrong = package not in packages or not package  # "": a relative import
            if wrong:
                found.append(f"{module}:{line} imports {target}")
    return list(dict.fromkeys(found))


def circle(sources: Mapping[str, str]) -> list[str]:
    """Returns modules that import each other in a circle, if there are any."""
    graph = {
        module: {target for target, _ in imports_of(source, sources) if target in sources}
        for module, source in sources.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


# ------------------------------------------------------------------------------------------------
# The package
# ------------------------------------------------------------------------------------------------


def test_no_import_leaves_its_layers():
    assert wrong_imports(read_sources(FOLDER)) == []


def test_no_circle():
    assert circle(read_sources(FOLDER)) == []


def test_every_module_has_a_layer():
    assert {layer_of(module) for module in read_sources(FOLDER)} <= MAY_IMPORT.keys()


def test_layers_have_an_order():
    graphlib.TopologicalSorter({k: v.split() for k, v in MAY_IMPORT.items()}).prepare()


# ------------------------------------------------------------------------------------------------
# The check finds what it should
# ------------------------------------------------------------------------------------------------

ALLOWED = {
    "tokenvit_jax": "from tokenvit_jax import ops\nfrom tokenvit_jax.models import create_model",
    "tokenvit_jax.ops": "from tokenvit_jax.ops.attention import attend",
    "tokenvit_jax.ops.attention": "import math\nimport jax.numpy as jnp\nfrom jax import lax\n"
    "from tokenvit_jax.kernels.attention import blocks\nfrom tokenvit_jax.errors import UserError",
    "tokenvit_jax.kernels.attention": "import jax",
    "tokenvit_jax.errors": "",
    "tokenvit_jax.models": "from tokenvit_jax import ops\nimport flax.linen as nn",
    "tokenvit_jax.tasks.depth.task": "from tokenvit_jax.tasks.task import Task\nimport flax",
    "tokenvit_jax.tasks.task": "from tokenvit_jax.data import record",
    "tokenvit_jax.data.record": "import numpy",
    "tokenvit_jax.train": "from tokenvit_jax import cli\nfrom tokenvit_jax.tasks import task",
    "tokenvit_jax.cli": "",
}


def test_what_is_allowed():
    assert wrong_imports(ALLOWED) == []
    assert circle(ALLOWED) == []


@pytest.mark.parametrize(
    ("module", "source", "target"),
    [
        ("ops.attention", "import flax.linen as nn", "flax.linen"),
        ("ops.attention", "from tokenvit_jax.layers import dense", "tokenvit_jax.layers"),
        ("ops.attention", "from tokenvit_jax import cli", "tokenvit_jax.cli"),
        ("kernels.attention", "from tokenvit_jax import ops", "tokenvit_jax.ops"),
        (
            "layers.attention",
            "import tokenvit_jax.kernels.attention",
            "tokenvit_jax.kernels.attention",
        ),
        ("layers.attention", "from tokenvit_jax.training import step", "tokenvit_jax.training"),
        ("models.vit", "from tokenvit_jax.heads import fpn", "tokenvit_jax.heads"),
        ("models.vit", "import tokenvit_jax.data.record", "tokenvit_jax.data.record"),
        ("models.vit", "from .registry import register", ".registry"),
        ("heads.fpn", "import tokenvit_jax.tasks.task", "tokenvit_jax.tasks.task"),
        ("heads.fpn", "from tokenvit_jax.config import ENTRIES", "tokenvit_jax.config"),
        ("data.pipeline", "from tokenvit_jax.tasks import task", "tokenvit_jax.tasks.task"),
        ("tasks.task", "def f():\n    import tokenvit_jax.training", "tokenvit_jax.training"),
        ("measure.macs", "from tokenvit_jax.data import record", "tokenvit_jax.data.record"),
        ("training.step", "import tokenvit_jax.train", "tokenvit_jax.train"),
        ("training.step", "from tokenvit_jax import create_model", "tokenvit_jax"),
        ("predict", "from tokenvit_jax import train", "tokenvit_jax.train"),
        ("other.module", "import tokenvit_jax.errors", "tokenvit_jax.errors"),
    ],
)
def test_a_wrong_import_is_found(module, source, target):
    line = len(source.splitlines())
    found = wrong_imports({**ALLOWED, f"tokenvit_jax.{module}": source})
    assert found == [f"tokenvit_jax.{module}:{line} imports {target}"]


def test_a_circle_is_found():
    sources = {
        "tokenvit_jax.ops.a": "from tokenvit_jax.ops import b",
        "tokenvit_jax.ops.b": "def f():\n    from tokenvit_jax.ops.c import g",
        "tokenvit_jax.ops.c": "import tokenvit_jax.ops.a",
    }
    assert set(circle(sources)) == sources.keys()
    through_the_folder = {
        "tokenvit_jax.ops": "from tokenvit_jax.ops.a import f",
        "tokenvit_jax.ops.a": "from tokenvit_jax.ops import g",
    }
    assert set(circle(through_the_folder)) == through_the_folder.keys()
