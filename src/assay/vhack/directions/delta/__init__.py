"""The adapter δS, the arms that hold its training back, and what they measure."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
