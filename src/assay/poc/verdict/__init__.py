"""Verdicts: noise laws, their calibration, and the judge that tests residuals against them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
