"""Training: state, optimizer, step, mixing, devices, checkpoints and logs."""
