"""Contrastive pairs: files, a bundled set, a generator of minimal pairs, and proof that each does
what it claims.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
