"""Controllers: learning-rate schedulers that hear of training through one number an epoch."""

from .aalr import AALR
from .aslr import ASLR
from .range_test import RangeTest, lr_range_test

__all__ = ["AALR", "ASLR", "RangeTest", "lr_range_test"]
