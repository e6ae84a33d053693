"""Hack directions: gradients of pairs, a basis of them, checks of it, and training beside it.

Only those detectors that read gradients need it; a filter on text or activations does not.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
