"""The validator: takes the work of many nodes, recomputes a secret sample of it, and keeps the
ledger of their lives.

It needs the extra ``serve``. docs/validator.md describes it; ``assay poc validator`` runs it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
