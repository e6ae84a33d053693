"""Detectors of reward hacking: each gives rollouts a score, and a threshold turns it into flags."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
