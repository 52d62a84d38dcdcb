"""The demo: trains a small MLP on MNIST digits with plain and adaptive optimizers over six decades of initial rates."""
