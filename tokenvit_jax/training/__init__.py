"""Training: loop, step, optimizer, devices, processes, checkpoints, runs and logs."""
