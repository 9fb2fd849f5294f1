"""Necks and heads for dense tasks; they read the tokens or the maps of a backbone."""

from tokenvit_jax.heads.segmenter import LinearDecoder, MaskTransformer

__all__ = ["LinearDecoder", "MaskTransformer"]
