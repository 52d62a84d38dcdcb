"""Callbacks for trainers, one module each: ``transformers`` and ``lightning``. The package itself imports neither."""

from ..engine.handles import unwrap

__all__ = ["unwrap"]
