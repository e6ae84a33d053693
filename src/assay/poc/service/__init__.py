"""The service: the published HTTP API for one model, durable, bounded and observable.

It needs the extra ``serve``. docs/service.md describes it; ``assay poc serve`` runs it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
