"""Drop-in ``torch.optim`` optimizers whose learning rates can adapt: any backbone with any learning-rate policy."""

from . import backends
from .core.version import __version__
from .optimizers import (
    SGD,
    ActiveAdaBelief,
    ActiveAdam,
    ActiveAdamW,
    ActiveBelief,
    ActiveNAdam,
    ActiveRAdam,
    ActiveSGD,
    AdaBelief,
    Adam,
    AdamW,
    AdaptiveOptimizer,
    NAdam,
    RAdam,
)
from .policies import ActiveLR, FixedLR, Hypergradient, Policy, TrainableLR
from .schedules import AALR, ASLR, lr_range_test
from .training.fp32 import export_fp32, import_fp32
from .training.intervals import steps_per_epoch
from .training.logging import RateLogger, log_learning_rates
from .training.param_groups import param_groups
from .training.release import GradientRelease, release_gradients

__all__ = [
    "AALR",
    "ASLR",
    "SGD",
    "ActiveAdaBelief",
    "ActiveAdam",
    "ActiveAdamW",
    "ActiveBelief",
    "ActiveLR",
    "ActiveNAdam",
    "ActiveRAdam",
    "ActiveSGD",
    "AdaBelief",
    "Adam",
    "AdamW",
    "AdaptiveOptimizer",
    "FixedLR",
    "GradientRelease",
    "Hypergradient",
    "NAdam",
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
