"""Drop-in ``torch.optim`` optimizers whose learning rates can adapt: backbones times learning-rate policies."""

from . import backends
from .controllers import AALR, ASLR, lr_range_test
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
    "Hypergradient",
    "Policy",
    "RAdam",
    "TrainableLR",
    "__version__",
    "backends",
    "export_fp32",
    "import_fp32",
    "lr_range_test",
    "steps_per_epoch",
]
