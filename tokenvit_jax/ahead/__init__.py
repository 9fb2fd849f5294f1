"""Compiles steps for devices that this machine does not have, and describes the programs."""
