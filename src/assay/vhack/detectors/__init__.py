"""Detectors of reward hacking: a score for each rollout, and a threshold that flags it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
