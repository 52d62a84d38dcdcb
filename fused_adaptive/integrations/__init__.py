"""Callbacks for trainers, in the modules ``transformers`` and ``lightning``. ``fused_adaptive`` imports neither."""

from ..engine.handles import unwrap

__all__ = ["unwrap"]
