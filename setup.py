"""Build of the native extensions; everything else stands in pyproject.toml. There are none yet."""

from setuptools import setup

setup(ext_modules=[])
