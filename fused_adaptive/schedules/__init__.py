"""Learning-rate schedules that are driven by one metric per epoch, and the learning-rate range test."""

from .aalr import AALR
from .aslr import ASLR
from .range_test import RangeTest, lr_range_test

__all__ = ["AALR", "ASLR", "RangeTest", "lr_range_test"]
