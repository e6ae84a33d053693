"""The validator: takes the work of many nodes, recomputes a secret sample of it, and keeps the ledger of their lives.

It needs the extra ``serve``. docs/validator.md describes it; ``assay poc validator`` runs it.
"""

from assay.poc.validator.app import create_app, validate
from assay.poc.validator.settings import ValidatorSettings

__all__ = ["ValidatorSettings", "create_app", "validate"]
