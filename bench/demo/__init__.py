"""The demo: a small MLP on MNIST digits, torch's optimizers against ours over six decades of the initial rate."""
