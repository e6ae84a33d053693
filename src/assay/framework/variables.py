"""Environment variables that commands and the vLLM plugin read, to warn of misspelt names.

The settings classes declare them. This copy spares a command the import of all those classes; a
test compares it with docs/configuration.md, which is generated from them.
"""

import os
from collections.abc import Iterable
from difflib import get_close_matches

PREFIX = "ASSAY_"
NAMES = frozenset(
    [
        "ALLOW_PRIVATE_CALLBACKS",
        "ALPHA",
        "API_KEY",
        "API_KEY_FILE",
        "BETA",
        "CACHE",
        "CALIBRATION",
        "CALLBACK_ATTEMPTS",
        "CALLBACK_BACKOFF",
        "CALLBACK_BACKOFF_MAX",
        "CALLBACK_CONCURRENCY",
        "CALLBACK_INTERVAL",
        "CALLBACK_NONCES",
        "CALLBACK_SECRET",
        "CALLBACK_TIMEOUT",
        "COMPATIBILITY",
        "CONFIG",
        "DATA_DIR",
        "DEVICE",
        "DRAIN",
        "DTYPE",
        "ERRORS",
        "HEADER_TIMEOUT",
        "JOB_TTL",
        "KEEP_ROUNDS",
        "LEDGER",
        "MAX_BODIES",
        "MAX_BODY",
        "MAX_CLIENT_CONNECTIONS",
        "MAX_CLIENT_STREAMS",
        "MAX_CONNECTIONS",
        "MAX_HEADER",
        "MAX_NONCES",
        "MAX_PENDING",
        "MAX_PENDING_JOBS",
        "MAX_POSITIONS",
        "MAX_QUEUED_NONCES",
        "MAX_RECEIPTS",
        "MAX_STREAMS",
        "MAX_WAITING",
        "MODEL",
        "PINS",
        "READ_KEY",
        "RECEIPT_CALLBACK_URL",
        "RECEIPT_DAYS",
        "RECEIPT_PROMPTS",
        "REFERENCE",
        "RESPONSES",
        "RESPONSES_BLOCK",
        "RESPONSES_PUBLIC_KEY",
        "RESPONSES_WAIT",
        "RESUME",
        "SEQ_LEN",
        "SERVED_MODEL_NAME",
        "VALIDATE_KEY",
        "VLLM_ARGS",
        "VLLM_CHAT_IN_FLIGHT",
        "VLLM_DRAIN",
        "VLLM_IN_FLIGHT",
        "VLLM_MODE",
        "VLLM_PATH",
        "VLLM_QUIET",
        "VLLM_SHARE",
        "VLLM_WAIT",
        "WAIT",
    ]
)
OF_KUBERNETES = ("PORT", "SERVICE_")
"""Beginnings of names that Kubernetes sets in every container beside a service called assay."""


def unknown(further: Iterable[str]) -> dict[str, str]:
    """Return the set variables that nothing reads, each with the known name nearest to it, or "".

    Args:
        further: Variables of a command of another package, which are known besides.
    """
    names = {PREFIX + name for name in NAMES} | set(further)
    return {
        name: "".join(get_close_matches(name, names, n=1, cutoff=0.8))
        for name in sorted(os.environ.keys() - names)
        if name.startswith(PREFIX) and not name.removeprefix(PREFIX).startswith(OF_KUBERNETES)
    }
