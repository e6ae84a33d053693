"""The work of the service: states, the engine thread, artifact jobs, delivery of callbacks."""

from assay.poc.service.runtime._callback_guard import Blocked, check_url, resolve
from assay.poc.service.runtime._controller import Controller
from assay.poc.service.runtime._delivery import Delivery
from assay.poc.service.runtime._deployment import Deployment
from assay.poc.service.runtime._metrics import CONTENT_TYPE, Exported, Metrics
from assay.poc.service.runtime._receipts import ReceiptKeeper, ReceiptSink

__all__ = [
    "CONTENT_TYPE",
    "Blocked",
    "Controller",
    "Delivery",
    "Deployment",
    "Exported",
    "Metrics",
    "ReceiptKeeper",
    "ReceiptSink",
    "check_url",
    "resolve",
]
