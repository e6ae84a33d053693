"""Honest statistics: the chord law, count and sequential tests, AUROC, resampling.

The formulas and what they assume are derived in docs/statistics.md.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
