"""Gradient-space hack directions: extract them from pairs, and prove that they are real."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
