"""Parts of a step: participants, their state, checkpoints, clipping, compiled steps."""
