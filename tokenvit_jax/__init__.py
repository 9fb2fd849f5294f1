"""Token-efficient vision transformers in JAX: exact operators, models and their training."""

from typing import TYPE_CHECKING, Any

from tokenvit_jax import ops
from tokenvit_jax.models import create_model, list_models

if TYPE_CHECKING:
    from tokenvit_jax.training.run import Run, load_run

__all__ = ["Run", "create_model", "list_models", "load_run", "ops"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports the names that need orbax and grain at their first use."""
    if name in ("Run", "load_run"):
        from tokenvit_jax.training import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
