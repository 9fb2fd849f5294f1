"""Metrics: sums on the device, and meters that turn them into numbers on the host."""
