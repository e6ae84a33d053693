"""Contrastive pairs: files, a bundled set, a generator, and verification by execution."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
