"""``assay poc ledger``: show the evidence of nodes' lives, audit it, export and merge it."""

from collections import deque
from collections.abc import Collection
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
from pydantic import Field

from assay.cli.flags import ARGUMENT, FileSettings, Limit
from assay.cli.poc import poc
from assay.errors import UsageError, in_one_line
from assay.files.names import normal_form
from assay.framework.output import emit_json, show_tables, show_values, table
from assay.settings import Settings

if TYPE_CHECKING:
    from assay.poc.verdict.entries import Account, Entry, Standing

ledger = poc.group_of(
    "ledger", "Look at ledgers of nodes' lives.", panel="Validator", elsewhere=("merge",)
)


class LedgerSettings(Settings):
    """Settings of a command that reads a ledger."""

    ledger: Annotated[Path, ARGUMENT] = Field(
        description="File of the ledger, or for audit an export of one."
    )


class ShowSettings(LedgerSettings):
    """Settings of ``assay poc ledger show``."""

    public_key: Annotated[str | None, "KEY"] = Field(
        None, description="Key of one node, to list its audits too."
    )
    limit: Limit = 100


class LedgerAuditSettings(LedgerSettings):
    """Settings of ``assay poc ledger audit``."""

    head: Annotated[str | None, "HASH"] = Field(
        None, description="Head that was published; entries up to it must be there."
    )


class ExportSettings(FileSettings, LedgerSettings):
    """Settings of ``assay poc ledger export``."""


@ledger.add("show", ShowSettings, example="assay poc ledger show ledger.sqlite3 --public-key KEY")
def show(chosen: ShowSettings, as_json: bool) -> None:
    """Show accounts, or one node with its audits.

    This does not audit the ledger.
    """
    from assay.poc.verdict.ledger import Ledger

    key = chosen.public_key
    with Ledger(chosen.ledger, read_only=True) as opened:
        count, head = opened.head
        matching = (
            standing
            for standing in opened.standings()
            if key is None or normal_form(key) == normal_form(standing.account.public_key)
        )
        selected = list(islice(matching, chosen.limit))
        if key is not None and not selected:
            raise no_such_key(
                key, {standing.account.public_key for standing in islice(opened.standings(), 10)}
            )
        audits = {
            standing.account: [*deque(opened.entries(standing.account), chosen.limit)]
            for standing in selected
            if key is not None
        }
    if as_json:
        accounts = [standing.as_dict() for standing in selected]
        # Of all accounts, or of none.
        for shown, entries in zip(accounts, audits.values(), strict=False):
            shown["entries"] = [
                {**entry.model_dump(), "verdict": entry.verdict} for entry in entries
            ]
        values = {"path": str(chosen.ledger), "count": count, "head": head, "accounts": accounts}
        emit_json("assay.poc.ledger/1", values)
        return
    table(
        (
            "key",
            "model",
            "build",
            "preset",
            "audits",
            "nonces",
            "since",
            "fault",
            "max log e",
            "payable",
            "verdict",
        ),
        [(*names_of(standing.account), *_numbers(standing)) for standing in selected],
    )
    for account, entries in audits.items():
        table(
            ("audit", "time", "block", "nonces", "fault", "max log e", "verdict"),
            [_row(entry) for entry in entries],
        )
        click.echo(
            in_one_line(f"audits of build {_cut(account.build)}, preset {_cut(account.preset)}")
            + "\n"
        )
    click.echo(f"{count} entries, head {in_one_line(head)}")


@ledger.add(
    "audit", LedgerAuditSettings, example="assay poc ledger audit ledger.sqlite3 --head HASH"
)
def audit(chosen: LedgerAuditSettings, as_json: bool) -> int:
    """Compute every hash and every verdict again.

    Exit code 0 clean, 1 tampered with, 2 bad input. Whoever rewrites the whole ledger, hashes
    included, can only be found by a head that was published before: give it with --head.
    """
    from assay.poc.verdict.ledger_audit import audit_ledger

    outcome = audit_ledger(chosen.ledger, head=chosen.head)
    unpublished = "not given: a ledger that was rewritten as a whole would be clean too"
    rows = [
        ("result", "clean" if outcome.clean else "tampered with"),
        ("entries", f"{outcome.entries} as they should be, of {outcome.accounts} account(s)"),
        ("head", outcome.head),
        ("published head", unpublished if chosen.head is None else chosen.head),
        *(("fault", str(fault)[:400]) for fault in outcome.faults),
        *(("note", note) for note in outcome.notes),
    ]
    values = {"path": str(chosen.ledger), **outcome.as_dict()}
    show_tables("assay.poc.ledger.audit/1", values, as_json, (("", "result"), rows, ""))
    return outcome.exit_code


@ledger.add(
    "export", ExportSettings, example="assay poc ledger export ledger.sqlite3 -o ledger.jsonl"
)
def export(chosen: ExportSettings, as_json: bool) -> None:
    """Write all that an audit elsewhere needs."""
    from assay.poc.verdict.ledger import Ledger

    with Ledger(chosen.ledger, read_only=True) as opened:
        count, head = opened.export(chosen.output, overwrite=chosen.overwrite)
    show_values(
        "assay.poc.ledger.export/1",
        {"path": str(chosen.output), "entries": count, "head": head},
        as_json,
    )


def no_such_key(key: str, keys: Collection[str]) -> UsageError:
    """Return the refusal of a key without audits, which names keys that have some."""
    return UsageError(
        f"--public-key {key:.80}, of which there is no audit",
        wanted=f"a key with audits, such as {', '.join(sorted(map(_cut, keys)))}"
        if keys
        else "a ledger with audits",
        do="correct --public-key, or leave it out to list all accounts",
    )


def names_of(account: "Account") -> tuple[str, ...]:
    """Return key, model, build and preset of an account, no longer than columns of a table."""
    return tuple(
        map(_cut, (account.public_key, account.digest[:12], account.build, account.preset))
    )


def _cut(text: str | None) -> str:
    return (text or "")[:40]


def _numbers(standing: "Standing") -> tuple[object, ...]:
    evidence = standing.evidence
    return (
        standing.audits,
        f"{evidence.n} of {standing.recorded}" if evidence.n < standing.recorded else evidence.n,
        _day(standing.begun),
        _cut(standing.fault),
        f"{evidence.log_e_max:.1f}",
        "" if standing.payable is None else f"{standing.payable:.1%}",
        standing.verdict,
    )


def _row(entry: "Entry") -> tuple[object, ...]:
    counted = len(entry.nonces) - len(entry.excluded)
    return (
        entry.seq,
        _day(entry.time),
        _cut(entry.block_hash),
        f"{counted} of {len(entry.nonces)}" if entry.excluded else counted,
        _cut(entry.fault),
        f"{entry.outcome.log_e_max:.1f}",
        entry.verdict,
    )


def _day(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"
    except (OverflowError, ValueError, OSError):  # no clock shows it, but a file may
        return f"{seconds:.3g} s"
