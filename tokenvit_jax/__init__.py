"""Token-efficient vision transformers in JAX: exact operators, models and their training."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenvit_jax import ops
    from tokenvit_jax.models import create_model, list_models
    from tokenvit_jax.training.run import Run, load_run

# Public name -> its module, which is imported at the first use of the name: a command prints its
# help without jax, and models need neither orbax nor grain.
_MODULES = {
    "Run": "training.run",
    "create_model": "models",
    "list_models": "models",
    "load_run": "training.run",
    "ops": "ops",
}
__all__ = ["Run", "create_model", "list_models", "load_run", "ops"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return module if name == "ops" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
