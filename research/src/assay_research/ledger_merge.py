"""One decision from the ledgers of several validators, valid however they depend on each other.

Validators that check one node see the same proofs, often the same nonces, and so the same honest
noise: their e-values are not independent and must not be multiplied. But each ledger's e-value,
stopped by a rule that looks at this ledger alone, has mean at most 1 under honest noise, and so has
the average of them whatever their dependence (Vovk and Wang 2021). By Markov's inequality the
average reaches 1/alpha with chance alpha at most.

Of each e-value counts no more than what stands without any one block and without places of the
batch that may be faulty, as in a life. It stops after the first audit at which that would decide
alone, at ``L``/alpha among ``L`` ledgers. So evidence once found is not lost again while other
ledgers catch up. The evidence for honesty is averaged in the same way, under the hypothesis that
the node cheats.

Nothing shows whether a validator measured what it wrote. But if ``f`` ledgers at most are invented,
the others have e-values, and the average without the ``f`` largest is at most that of ``L − f`` of
those: the bound alpha holds whatever the liars wrote. In the same way no ``f`` liars make a cheat
honest.

This is the chance of one decision, at a time that was fixed beforehand. The largest of many
averages, as ledgers grow, has no such bound: Ville's inequality needs one filtration in which the
average is a supermartingale, and what one ledger knows may tell how another one continues.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from assay.errors import DataError, UsageError
from assay.poc.verdict.entries import Account, Entry, Genesis
from assay.poc.verdict.ledger import take_entry
from assay.poc.verdict.ledger_audit import LedgerSource, open_source
from assay.poc.verdict.ledger_tables import AT_ONCE, LEDGER, UPDATES, read_noise
from assay.poc.verdict.life import Life, log_average
from assay.poc.verdict.pool_faults import STRIKES
from assay.stats.e_values import Decision, decide

MOST_LEDGERS = 1000
MOST_ACCOUNTS = 100_000  # of one ledger, of which every account is held in memory


@dataclass(frozen=True, kw_only=True)
class LedgerShare:
    """What one ledger adds to the decision on an account.

    Args:
        ledger: Id of the ledger.
        n: Number of residuals that count.
        verdict: What it would decide alone, as one of ``L`` ledgers.
        log_e_value: Logarithm of what stands of its e-value, stopped where it would decide alone.
        log_evidence_honest: Logarithm of its evidence for honesty, stopped likewise.
        fault: Places of the batch at which its last audits together are large, or strikes that are
            fraud; None without any. It alone is never honest beside it.
    """

    ledger: str
    verdict: Decision = "undecided"
    n: int = 0
    log_e_value: float = 0.0
    log_evidence_honest: float = 0.0
    fault: str | None = None


@dataclass(frozen=True, kw_only=True)
class MergedStanding:
    """What several ledgers say together of an account.

    Args:
        account: Account.
        verdict: ``fraud`` when ``log_e_value`` ≥ ln 1/alpha; else ``honest`` when
            ``log_evidence_honest`` ≥ ln 1/beta, and no more ledgers show an open fault than may
            be liars; else ``undecided``.
        log_e_value: Logarithm of the average of the stopped e-values, without the largest ``liars``
            of them.
        log_evidence_honest: Logarithm of the average of the stopped evidence for honesty, likewise.
        rests_on: Ids of the ledgers without any one of which the others decide otherwise; empty
            where it stands without any one.
        shares: What each ledger adds; a ledger that does not know the account adds an e-value of 1.
    """

    account: Account
    verdict: Decision
    log_e_value: float
    log_evidence_honest: float
    rests_on: tuple[str, ...]
    shares: tuple[LedgerShare, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        values = asdict(self)
        return {**values.pop("account"), **values}


def merge_ledgers(
    ledgers: Iterable[str | Path],
    *,
    alpha: float | None = None,
    beta: float | None = None,
    liars: int = 0,
) -> list[MergedStanding]:
    """Decide on every account from several ledgers or exports of ledgers, each of which is audited
    first.

    Which ledgers are merged, and when, must not depend on what they say.

    Args:
        ledgers: Files of ledgers, or exports, of different validators.
        alpha: Bound on the chance that this decision accuses an honest node; that of the ledgers
            when None.
        beta: Bound on the chance that this decision calls a cheater honest; that of the ledgers
            when None.
        liars: Number of ledgers that may be invented, against which both bounds hold.

    Returns:
        What the ledgers say together, by key, model, build and preset.

    Raises:
        UsageError: No ledger or the same one twice was given, or the ledgers have different error
            rates.
        DataError: A file is no ledger, or has been tampered with.
        StorageError: A file cannot be read.
    """
    paths = [Path(path) for path in ledgers]
    if not 0 <= liars < len(paths) <= MOST_LEDGERS:
        raise UsageError(
            f"{len(paths)} ledgers, {liars} of them liars",
            wanted=f"1 to {MOST_LEDGERS}, and fewer liars",
            do="name the files of some, or fewer --liars",
        )
    with ExitStack() as stack:
        sources = [stack.enter_context(open_source(path)) for path in paths]
        begun = [_checked(source) for source in sources]
        _refuse_twice(paths, begun)
        stated = {"alpha": alpha, "beta": beta}
        rates = {
            name: _rate(name, rate, [getattr(begun_ledger, name) for begun_ledger in begun])
            for name, rate in stated.items()
        }
        shares: dict[Account, dict[str, LedgerShare]] = {}
        for source, genesis in zip(sources, begun, strict=True):
            for account, share in _stopped(source, genesis, rates, len(paths)):
                shares.setdefault(account, {})[genesis.id] = share
    ids = [genesis.id for genesis in begun]
    return [_decide(account, ids, shares[account], rates, liars) for account in sorted(shares)]


def _checked(source: LedgerSource) -> Genesis:
    """Audit a ledger and return its beginning."""
    outcome = source.audit()
    if outcome.faults:
        raise DataError(
            f"{source.path}: {outcome.faults[0]}",
            wanted="a ledger that nobody has changed",
            do="leave it out, or ask its validator for it again",
        )
    if outcome.accounts > MOST_ACCOUNTS:
        raise DataError(
            f"{source.path}: {outcome.accounts} accounts",
            wanted=f"at most {MOST_ACCOUNTS}",
            do="leave it out",
        )
    with source.database.read() as connection:
        text = connection.execute(sa.select(LEDGER.c.genesis)).scalar_one()
    return Genesis.parse(text, str(source.path))


def _refuse_twice(paths: Sequence[Path], begun: Sequence[Genesis]) -> None:
    paths_by_id: dict[str, Path] = {}
    for path, genesis in zip(paths, begun, strict=True):
        if genesis.id in paths_by_id:
            raise UsageError(
                f"{paths_by_id[genesis.id]} and {path}, which are one ledger",
                wanted="ledgers of different validators",
                do="leave the older one out",
            )
        paths_by_id[genesis.id] = path


def _rate(name: str, stated: float | None, rates: Sequence[float]) -> float:
    if stated is None and len(set(rates)) > 1:
        raise UsageError(
            f"ledgers with {name} {' and '.join(f'{rate:g}' for rate in sorted(set(rates)))}",
            wanted=f"one {name} for the decision",
            do=f"pass --{name} {min(rates):g}",
        )
    rate = rates[0] if stated is None else stated
    if not 0 < rate < 1:
        raise UsageError(
            f"--{name} {rate:g}", wanted="a chance in (0, 1)", do=f"pass --{name} {rates[0]:g}"
        )
    return rate


def _stopped(
    source: LedgerSource, genesis: Genesis, rates: dict[str, float], ledgers: int
) -> Iterator[tuple[Account, LedgerShare]]:
    """Yield every account of a ledger with what it adds, from its evidence.

    Both numbers have mean 1 at most, the one under honest noise and the other under a cheat,
    because each stops by a rule that looks at this ledger alone. So they can be averaged over
    ledgers.
    """
    query = sa.select(UPDATES.c.entry).order_by(UPDATES.c.account, UPDATES.c.seq)
    needed_e, needed_honest = (math.log(ledgers / rates[name]) for name in ("alpha", "beta"))
    with source.database.read() as connection:
        rows = connection.execute(query, execution_options={"yield_per": AT_ONCE}).scalars()
        for account, entries in groupby(
            (Entry.parse(text, str(source.path)) for text in rows), attrgetter("account")
        ):
            life = Life(**rates)
            log_e = -math.inf
            log_honest = -math.inf
            for entry in entries:
                life_evidence = take_entry(life, entry, read_noise(connection, entry.law)).evidence
                if log_e < needed_e <= life_evidence.log_e_value:
                    log_e = _standing(life)
                if log_honest < needed_honest:
                    log_honest = life_evidence.log_evidence_honest
            log_e = log_e if log_e >= needed_e else _standing(life)
            alone = decide(
                log_e, log_honest, **{name: rate / ledgers for name, rate in rates.items()}
            )
            fault = life_evidence.faulty_places
            # Fraud in this ledger, also when the fault has ended.
            if (life_evidence.strikes or 0) >= STRIKES:
                fault = fault or f"{life_evidence.strikes} strikes"
            share = LedgerShare(
                ledger=genesis.id,
                n=life_evidence.n,
                verdict="undecided" if alone == "honest" and fault is not None else alone,
                fault=fault,
                log_e_value=log_e,
                log_evidence_honest=log_honest,
            )
            yield account, share


def _standing(life: Life) -> float:
    """Return the logarithm of the average of what stands of each test's e-value."""
    return log_average([(test.log_weight, min(test.log_e, life.held(test))) for test in life.tests])


def _decide(
    account: Account,
    ledgers: Sequence[str],
    shares_by_ledger: dict[str, LedgerShare],
    rates: dict[str, float],
    liars: int,
) -> MergedStanding:
    shares = tuple(shares_by_ledger.get(ledger, LedgerShare(ledger=ledger)) for ledger in ledgers)

    def decided(shares: Sequence[LedgerShare]) -> tuple[Decision, float, float]:
        log_e = log_mean([share.log_e_value for share in shares], without=liars)
        log_honest = log_mean([share.log_evidence_honest for share in shares], without=liars)
        verdict = decide(log_e, log_honest, **rates)
        if verdict == "honest" and sum(share.fault is not None for share in shares) > liars:
            verdict = "undecided"
        return verdict, log_e, log_honest

    verdict, log_e, log_honest = decided(shares)
    others = (
        (suspect.ledger, [share for share in shares if share is not suspect]) for suspect in shares
    )
    return MergedStanding(
        account=account,
        verdict=verdict,
        log_e_value=log_e,
        log_evidence_honest=log_honest,
        rests_on=tuple(
            ledger
            for ledger, remaining in others
            if len(remaining) <= liars or decided(remaining)[0] != verdict
        ),
        shares=shares,
    )


def log_mean(logs: Sequence[float], *, without: int = 0) -> float:
    """Return the logarithm of the average of numbers, given by their logarithms, but for the
    largest of them.
    """
    smallest = sorted(logs)[: len(logs) - without]
    return float(np.logaddexp.reduce(smallest)) - math.log(len(smallest))
