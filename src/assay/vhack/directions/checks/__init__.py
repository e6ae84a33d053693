"""Five checks whether hack directions are real, by held-out groups and exact or matched nulls."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
