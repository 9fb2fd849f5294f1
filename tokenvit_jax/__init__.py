"""Token-efficient vision transformers in JAX: exact operators, models and their training."""

from tokenvit_jax import ops
from tokenvit_jax.models import create_model, list_models

__all__ = ["create_model", "list_models", "ops"]
__version__ = "0.1.0"
