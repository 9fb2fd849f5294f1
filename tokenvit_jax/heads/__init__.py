"""Necks and heads for dense tasks, on the tokens or maps of a backbone."""

from tokenvit_jax.heads.segmenter import LinearDecoder, MaskTransformer

__all__ = ["LinearDecoder", "MaskTransformer"]
