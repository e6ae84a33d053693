"""Checks of single values: names, whole numbers, batch sizes and digests."""

import re

from assay.errors import UsageError
from assay.files.names import normal_form
from assay.files.references import stated_positions

# Largest nonce: exact in every JSON reader, and far beyond what a round can use.
MAX_NONCE = 2**53 - 1
MAX_BATCH = 65_536
MAX_NAME = 1024
DIGEST = re.compile("[0-9a-f]{64}")  # SHA-256 in hex


def check_name(name: str, value: object, *, do: str, fewest: int = 1) -> None:
    """Refuse a part of a seed text that is not ``fewest`` to 1024 printable characters in NFC."""
    if (
        not isinstance(value, str)
        or not fewest <= len(value) <= MAX_NAME
        or not value.isprintable()
        or value != normal_form(value)
    ):
        raise UsageError(
            f"{name} is {value!a:.80}",
            wanted=f"{fewest} to {MAX_NAME} printable characters in the normal form NFC, "
            "in which names can be told apart",
            do=do,
            field=name,
        )


def check_number(name: str, value: object, low: int, high: int) -> None:
    """Refuse a value that is not a whole number from ``low`` to ``high``."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(
            f"{name} is {value!r:.60}",
            wanted=f"a whole number in [{low}, {high}]",
            do=f"correct {name}",
            field=name,
        )


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch size that is not a number from 1 to 65 536."""
    if type(batch_size) is not int or not 1 <= batch_size <= MAX_BATCH:
        raise UsageError(
            f"batch size {batch_size!r}", wanted=f"1 to {MAX_BATCH}", do="try --batch-size 32"
        )


def check_positions(
    reference: str, max_positions: int | None, *, seq_len: int, steps: int = 0
) -> None:
    """Refuse a prompt that has, with its decoded steps, more positions than the model.

    Args:
        reference: Reference of the model.
        max_positions: Positions of the model; by default those that its files state, if any.
        seq_len: Positions of the prompt.
        steps: Decoded steps.
    """
    most = max_positions or stated_positions(reference)
    if most is None or 1 <= seq_len <= most - steps:
        return
    fitting = f"pass --seq-len {max(1, min(256, most - steps))}"
    raise UsageError(
        f"seq_len {seq_len}{f' and {steps} tokens' if steps else ''} with {reference}",
        wanted=f"1 to its {most} positions{' together' if steps else ''}",
        do=f"{fitting}, or another --preset such as decode-64" if steps else fitting,
    )


def check_digest(name: str, value: object) -> None:
    """Refuse a value that is not a SHA-256 in lower-case hexadecimal digits."""
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        raise UsageError(
            f"{name} is {value!r:.80}",
            wanted="a SHA-256: 64 lower-case hexadecimal digits",
            do=f"correct the {name}",
        )


def join_prefixed(*parts: object) -> str:
    """Join texts injectively: each after its length in UTF-8 bytes."""
    return "".join(f"{len(str(part).encode())}:{part}" for part in parts)
