"""One training run with TRL: tasks, teacher pool, log, checkpoints (extra ``train``)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
