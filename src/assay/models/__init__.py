"""Causal language models: load a checkpoint, weight modes, shape presets, the bundled reference
models.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
