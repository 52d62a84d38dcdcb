"""The optimizers: one file a family, with its classes and its update rule in PyTorch.

Arguments are those of the ``torch.optim`` namesakes, in the same order, and ``decoupled_weight_decay``, whether decay
acts on the parameter (``p ← p·(1 − α·wd)``) or joins the gradient; then the keywords of :class:`~.options.Options`. An
``lr`` that is a tensor on a GPU is read there.
"""

from .adabelief import ActiveAdaBelief, ActiveBelief, AdaBelief
from .adam import ActiveAdam, ActiveAdamW, Adam, AdamW
from .base import AdaptiveOptimizer
from .radam import ActiveRAdam, RAdam
from .sgd import SGD, ActiveSGD

__all__ = [
    "SGD",
    "ActiveAdaBelief",
    "ActiveAdam",
    "ActiveAdamW",
    "ActiveBelief",
    "ActiveRAdam",
    "ActiveSGD",
    "AdaBelief",
    "Adam",
    "AdamW",
    "AdaptiveOptimizer",
    "RAdam",
]
