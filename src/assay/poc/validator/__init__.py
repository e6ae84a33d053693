"""The validator: takes the work of many nodes, recomputes a secret sample of it, and keeps the ledger of their lives.

It needs the extra ``serve``. docs/validator.md describes it; ``assay poc validator`` runs it.
"""

from assay.poc.validator._app import create_app, validate
from assay.poc.validator._controller import LEDGER, Controller
from assay.poc.validator._epochs import Epoch, commitment, draw, message_seed
from assay.poc.validator._registry import NodeEntry, Registry
from assay.poc.validator._settings import ValidatorSettings

__all__ = [
    "LEDGER",
    "Controller",
    "Epoch",
    "NodeEntry",
    "Registry",
    "ValidatorSettings",
    "commitment",
    "create_app",
    "draw",
    "message_seed",
    "validate",
]
