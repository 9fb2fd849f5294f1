"""Segmentation by masks: semantic, panoptic and instance segmentation with one model."""
