"""Five checks whether hack directions are real: held-out data, groups kept together, exact or
matched nulls.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
