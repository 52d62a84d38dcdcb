"""All experiments by name, in the order in which one wants to have them."""

from __future__ import annotations

from . import (
    batches,
    controllers,
    gradients,
    language,
    rates,
    rivals,
    rules,
    surfaces,
    together,
    trainable,
)
from .experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    "gradients": gradients.EXPERIMENT,
    "surfaces": surfaces.EXPERIMENT,
    "rules": rules.EXPERIMENT,
    "trainable": trainable.EXPERIMENT,
    "rates": rates.EXPERIMENT,
    "batches": batches.EXPERIMENT,
    "language": language.EXPERIMENT,
    "rivals": rivals.EXPERIMENT,
    "controllers": controllers.EXPERIMENT,
    "together": together.EXPERIMENT,
}
