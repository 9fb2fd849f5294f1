"""Backbones and their registry."""

from tokenvit_jax.models.registry import create_model, list_models, model_settings

__all__ = ["create_model", "list_models", "model_settings"]
