"""The optimizers: one file a family, with its classes and its update rule in PyTorch."""
