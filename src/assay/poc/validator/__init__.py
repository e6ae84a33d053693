"""The validator: recomputes a secret sample of many nodes' nonces, and keeps their ledger.

It needs the extra ``serve``. docs/validator.md describes it; ``assay poc validator`` runs it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
