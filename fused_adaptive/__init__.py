"""Drop-in ``torch.optim`` optimizers whose learning rates can adapt: backbones times learning-rate policies."""

from . import backends
from .controllers import AALR, ASLR, lr_range_test
from .grouping import param_groups
from .intervals import steps_per_epoch
from .masters import export_fp32, import_fp32
from .optimizer import AdaptiveOptimizer
from .optimizers import (
    SGD,
    ActiveAdaBelief,
    ActiveAdam,
    ActiveAdamW,
    ActiveBelief,
    ActiveRAdam,
    ActiveSGD,
    AdaBelief,
    Adam,
    AdamW,
    RAdam,
)
from .policies import ActiveLR, FixedLR, Hypergradient, Policy, TrainableLR
from .rate_logging import RateLogger, log_learning_rates
from .release import GradientRelease, release_gradients

__version__ = "0.1.0"

__all__ = [
    "AALR",
    "ASLR",
    "SGD",
    "ActiveAdaBelief",
    "ActiveAdam",
    "ActiveAdamW",
    "ActiveBelief",
    "ActiveLR",
    "ActiveRAdam",
    "ActiveSGD",
    "AdaBelief",
    "Adam",
    "AdamW",
    "AdaptiveOptimizer",
    "FixedLR",
    "GradientRelease",
    "Hypergradient",
    "Policy",
    "RAdam",
    "RateLogger",
    "TrainableLR",
    "__version__",
    "backends",
    "export_fp32",
    "import_fp32",
    "log_learning_rates",
    "lr_range_test",
    "param_groups",
    "release_gradients",
    "steps_per_epoch",
]
