"""assay: measure what a language model really computed, and what its training really learns.

Two instruments on one foundation:

- :mod:`assay.poc` proves how much work a model on given hardware did, and checks such proofs.
- :mod:`assay.vhack` finds the gradient directions along which training would learn to cheat.

Subpackages are loaded on first use, so ``import assay`` and ``assay --help`` do not wait for torch.
"""

import lazy_loader

from assay._version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
