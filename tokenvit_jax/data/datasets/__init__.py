"""Builders that turn a dataset's original files into ArrayRecord files, without TensorFlow."""
