"""The optimizers: one file per family, with its classes and its update rule in PyTorch.

Each constructor takes the arguments of its ``torch.optim`` namesake, in the same order, then
``decoupled_weight_decay`` (True: decay acts on the parameter, ``p ← p·(1 − α·wd)``; False: it is added to the
gradient), then the keywords of :class:`~.options.Options`. If ``lr`` is a tensor on a GPU, the step reads it on the
GPU.
"""

from .adabelief import ActiveAdaBelief, ActiveBelief, AdaBelief
from .adam import ActiveAdam, ActiveAdamW, Adam, AdamW
from .base import AdaptiveOptimizer
from .nadam import ActiveNAdam, NAdam
from .radam import ActiveRAdam, RAdam
from .sgd import SGD, ActiveSGD

__all__ = [
    "SGD",
    "ActiveAdaBelief",
    "ActiveAdam",
    "ActiveAdamW",
    "ActiveBelief",
    "ActiveNAdam",
    "ActiveRAdam",
    "ActiveSGD",
    "AdaBelief",
    "Adam",
    "AdamW",
    "AdaptiveOptimizer",
    "NAdam",
    "RAdam",
]
