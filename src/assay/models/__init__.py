"""Causal language models: checkpoints, weight modes, shapes and bundled reference models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
