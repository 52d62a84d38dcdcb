"""What is behind a step: which parameters take part, their state, checkpoints, clipping, compiled steps."""
