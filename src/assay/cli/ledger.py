"""``assay poc ledger``: what the audits of a node's whole life say, and whether the file that says it is intact."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli.commands import App
from assay.cli.output import JsonFlag, emit_json, show_values, table
from assay.cli.settings import settings
from assay.errors import UsageError, visible

if TYPE_CHECKING:
    from assay.cli.ledger_settings import AuditSettings, ExportSettings, MergeSettings, ShowSettings
    from assay.poc.responses.judge import ResponseVerdict
    from assay.poc.verdict.judge import Verdict
    from assay.poc.verdict.ledger import Ledger
    from assay.poc.verdict.ledger_entries import Account, Entry, Standing


app = App(help="Look at the ledger of nodes' lives, audit it, and decide from several.")

_LEDGER = Annotated[Path, typer.Argument(help="File of the ledger.")]
_EITHER = Annotated[Path, typer.Argument(help="File of the ledger, or an export of one.")]


@app.command(epilog="Example: assay poc ledger show ledger.sqlite3 --public-key KEY")
@settings("assay.cli.ledger_settings:ShowSettings")
def show(chosen: "ShowSettings", ledger: _LEDGER, as_json: JsonFlag = False) -> None:
    """Show what the ledger says of every account, or of one node with its audits. This does not audit the ledger."""
    from assay.poc.verdict.ledger import Ledger

    with Ledger(ledger, read_only=True) as opened:
        count, head = opened.head
        wanted = (one for one in opened.standings() if chosen.public_key in (None, one.account.public_key))
        found = list(islice(wanted, chosen.limit))
        listed = [] if chosen.public_key is None else found
        audits = {one.account: list(opened.entries(one.account, newest=chosen.limit)) for one in listed}
    if as_json:
        accounts = [
            one.as_dict() | {"entries": [entry.model_dump() for entry in audits[one.account]]}
            if one.account in audits
            else one.as_dict()
            for one in found
        ]
        emit_json("assay.poc.ledger/1", {"path": str(ledger), "count": count, "head": head, "accounts": accounts})
        return
    table(
        ("key", "model", "build", "preset", "audits", "nonces", "since", "fault", "max log e", "verdict"),
        [(*_names(one.account), *_numbers(one)) for one in found],
    )
    for account, entries in audits.items():
        table(("audit", "time", "block", "nonces", "fault", "max log e", "verdict"), [_row(entry) for entry in entries])
        typer.echo(visible(f"audits of build {_cut(account.build)}, preset {_cut(account.preset)}") + "\n")
    typer.echo(f"{count} entries, head {head}")


@app.command(epilog="Example: assay poc ledger audit ledger.sqlite3 --head HASH")
@settings("assay.cli.ledger_settings:AuditSettings")
def audit(chosen: "AuditSettings", context: typer.Context, ledger: _EITHER, as_json: JsonFlag = False) -> None:
    """Compute every hash and every verdict again. Exit code 0 clean, 1 tampered with, 2 bad input.

    Whoever rewrites the whole ledger, hashes included, can only be found by a head that was published before: give it
    with --head.
    """
    from assay.poc.verdict.ledger import audit_ledger

    found = audit_ledger(ledger, head=chosen.head)
    if as_json:
        emit_json("assay.poc.ledger.audit/1", {"path": str(ledger), **found.as_dict()})
    else:
        published = "not given: a ledger that was rewritten as a whole would be clean too"
        rows = [
            ("result", "clean" if found.clean else "tampered with"),
            ("entries", f"{found.entries} as they should be, of {found.accounts} account(s)"),
            ("head", found.head),
            ("published head", published if chosen.head is None else chosen.head),
            *(("fault", str(fault)[:400]) for fault in found.faults),
        ]
        table(("", "result"), rows)
    context.exit(found.exit_code)


@app.command(epilog="Example: assay poc ledger merge mine.sqlite3 theirs.jsonl --public-key KEY")
@settings("assay.cli.ledger_settings:MergeSettings")
def merge(
    chosen: "MergeSettings",
    context: typer.Context,
    ledgers: Annotated[list[Path], typer.Argument(help="Ledgers of different validators, or exports of them.")],
    as_json: JsonFlag = False,
) -> None:
    """Decide from the ledgers of several validators. Exit code 0 all honest, 1 a fraud, 2 undecided or bad input.

    The e-values are averaged, which is valid although the validators saw the same proofs. Which ledgers are merged, and
    when, must not depend on what they say.
    """
    from assay.poc.verdict.ledger_merge import merge_ledgers

    merged = merge_ledgers(ledgers, alpha=chosen.alpha, beta=chosen.beta)
    merged = [one for one in merged if chosen.public_key in (None, one.account.public_key)]
    if as_json:
        emit_json("assay.poc.ledger.merge/1", {"accounts": [one.as_dict() for one in merged]})
    else:
        columns = ("key", "model", "build", "preset", "ledgers", "log e", "verdict")
        rows = [
            (
                *_names(one.account),
                f"{sum(share.n > 0 for share in one.shares)} of {len(ledgers)}",
                f"{one.log_e_value:.1f}",
                one.verdict,
            )
            for one in merged
        ]
        table(columns, rows)
    verdicts = {one.verdict for one in merged}
    context.exit(1 if "fraud" in verdicts else 0 if verdicts == {"honest"} else 2)


@app.command(epilog="Example: assay poc ledger export ledger.sqlite3 -o ledger.jsonl")
@settings("assay.cli.ledger_settings:ExportSettings")
def export(chosen: "ExportSettings", ledger: _LEDGER, as_json: JsonFlag = False) -> None:
    """Write all that an audit elsewhere needs as JSON Lines."""
    from assay.poc.verdict.ledger import Ledger

    with Ledger(ledger, read_only=True) as opened:
        count, head = opened.export(chosen.output, overwrite=chosen.overwrite)
    values = {"path": str(chosen.output), "entries": count, "head": head}
    show_values("assay.poc.ledger.export/1", values, as_json)


def check_recording(path: Path | None, alpha: float, believed: Sequence[str]) -> None:
    """Refuse a ledger, if one is named, that `verify` or `replay` cannot add to; nothing is written.

    Args:
        path: File of the ledger.
        alpha: Bound on the chance that an honest node is ever accused.
        believed: Names of values that would be taken on the prover's word.

    Raises:
        UsageError: Something of the proof is taken on the prover's word, or the file is no ledger, or one that was
            begun at another alpha.
        StorageError: The file cannot be read.
    """
    from assay.poc.verdict.ledger import check_ledger

    if path is None:
        return
    if believed:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in believed)
        raise UsageError(
            f"--ledger with {', '.join(believed)} taken on the prover's word",
            wanted="evidence about the node that is named, in a round that was asked for",
            do=f"pass {flags}",
        )
    check_ledger(path, alpha=alpha)


@contextmanager
def recording(path: Path | None, alpha: float) -> "Iterator[Ledger | None]":
    """Open the ledger that `verify` or `replay` writes to, if one is named, before anything is computed.

    Raises:
        UsageError: The ledger was begun at another alpha.
        StorageError: The ledger cannot be written.
    """
    from assay.poc.verdict.ledger import Ledger

    if path is None:
        yield None
        return
    with Ledger(path, alpha=alpha) as ledger:
        yield ledger


def exit_code(verdict: "Verdict | ResponseVerdict", standing: "Standing | None") -> int:
    """Return the code of `verify`: with a ledger, fraud and honesty are those of the whole life.

    A life that is honest does not cover a proof that, taken alone, is not.
    """
    if standing is None:
        return verdict.exit_code
    if standing.verdict == "fraud":
        return 1
    return 0 if standing.verdict == "honest" and verdict.verdict in ("honest", "undecided") else 2


def life_rows(standing: "Standing | None") -> list[tuple[str, str]]:
    """Return what `verify` says of the whole life."""
    if standing is None:
        return []
    evidence = standing.evidence
    said = f"{evidence.verdict}, after {standing.audits} audit(s) with {evidence.n} nonces that count"
    numbers = f"e-value e^{evidence.log_e_value:.1f}, at most e^{evidence.log_e_max:.1f}"
    return [("whole life", said), ("", f"{numbers}; for honesty e^{evidence.log_evidence_honest:.1f}")]


def _names(account: "Account") -> tuple[str, ...]:
    return tuple(map(_cut, (account.public_key, account.digest[:12], account.build, account.preset)))


def _cut(text: str | None) -> str:
    """Return what others wrote, no longer than a column of a table."""
    return (text or "")[:40]


def _numbers(one: "Standing") -> tuple[object, ...]:
    evidence = one.evidence
    counted = f"{evidence.n} of {one.recorded}" if evidence.n < one.recorded else evidence.n
    return one.audits, counted, _day(one.begun), _cut(one.fault), f"{evidence.log_e_max:.1f}", one.verdict


def _row(entry: "Entry") -> tuple[object, ...]:
    counted, outcome = len(entry.nonces) - len(entry.excluded), entry.outcome
    shown = f"{counted} of {len(entry.nonces)}" if entry.excluded else counted
    values = (_cut(entry.block_hash), shown, _cut(entry.fault), f"{outcome.log_e_max:.1f}", outcome.verdict)
    return entry.seq, _day(entry.time), *values


def _day(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"
    except (OverflowError, ValueError, OSError):  # no clock shows it, but a file may
        return f"{seconds:.3g} s"
