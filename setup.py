"""Shim over pyproject.toml: Beam's --setup_file builds the worker package from a setup.py."""

from setuptools import setup

setup()
