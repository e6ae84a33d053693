"""The database of the service: rounds, records, receipts and callbacks, in one SQLite file."""

from assay.poc.service.store._database import Database
from assay.poc.service.store._group import GroupCommit
from assay.poc.service.store._outbox import Callback, Outbox, open_outbox
from assay.poc.service.store._receipts import NewReceipt, Page, Receipts
from assay.poc.service.store._rounds import RECENT, Batch, Rounds, RoundValues, StoredRound, bin_counts
from assay.poc.service.store._schema import RECEIVED

__all__ = [
    "RECEIVED",
    "RECENT",
    "Batch",
    "Callback",
    "Database",
    "GroupCommit",
    "NewReceipt",
    "Outbox",
    "Page",
    "Receipts",
    "RoundValues",
    "Rounds",
    "StoredRound",
    "bin_counts",
    "open_outbox",
]
