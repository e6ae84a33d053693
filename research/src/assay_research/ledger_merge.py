"""One decision from the ledgers of several validators, valid however they depend on each other.

Validators that check one node see the same proofs, often the same nonces, and so the same honest noise: their e-values
are not independent and must not be multiplied. But each ledger's e-value, stopped by a rule that looks at this ledger
alone, has mean at most 1 under honest noise, and so has the average of them whatever their dependence (Vovk and Wang
2021). By Markov's inequality the average reaches 1/alpha with chance alpha at most.

Each test of a ledger stops after the first audit at which it would decide alone, that is at ``L``/alpha among ``L``
ledgers; so evidence once found is not lost again while other ledgers catch up. The evidence for honesty is averaged in
the same way, under the hypothesis that the node cheats.

This is the chance of one decision, at a time that was fixed beforehand. The largest of many averages, as ledgers grow,
has no such bound: Ville's inequality needs one filtration in which the average is a supermartingale, and what one
ledger knows may tell how another one continues.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import numpy as np
import sqlalchemy as sa

from assay.errors import DataError, UsageError
from assay.poc.verdict.ledger import AT_ONCE, LEDGER, UPDATES, Source, open_source, read_noise
from assay.poc.verdict.life import Account, Entry, Genesis, Life, Residuals, log_average
from assay.poc.verdict.noise import AnyNoise
from assay.stats.sequential import Verdict, decide

MOST_LEDGERS = 1000
MOST_ACCOUNTS = 100_000  # of one ledger, of which every account is held in memory


@dataclass(frozen=True, kw_only=True)
class LedgerShare:
    """What one ledger adds to the decision on an account.

    Args:
        ledger: Id of the ledger.
        n: Number of residuals that count.
        log_e_value: Logarithm of its e-value, of which each test stopped where it would decide alone.
        log_evidence_honest: Logarithm of its evidence for honesty, stopped likewise.
    """

    ledger: str
    n: int = 0
    log_e_value: float = 0.0
    log_evidence_honest: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MergedStanding:
    """What several ledgers say together of an account.

    Args:
        account: Account.
        verdict: ``fraud`` when ``log_e_value`` ≥ ln 1/alpha; else ``honest`` when ``log_evidence_honest`` ≥ ln 1/beta;
            else ``undecided``.
        log_e_value: Logarithm of the average of the stopped e-values.
        log_evidence_honest: Logarithm of the average of the stopped evidence for honesty.
        shares: What each ledger adds; a ledger that does not know the account adds an e-value of 1.
    """

    account: Account
    verdict: Verdict
    log_e_value: float
    log_evidence_honest: float
    shares: tuple[LedgerShare, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        rest = {name: value for name, value in self.__dict__.items() if name not in ("account", "shares")}
        return {**asdict(self.account), **rest, "shares": [asdict(share) for share in self.shares]}


def merge_ledgers(
    ledgers: Iterable[str | Path], *, alpha: float | None = None, beta: float | None = None
) -> list[MergedStanding]:
    """Decide on every account from several ledgers or exports of ledgers, each of which is audited first.

    Which ledgers are merged, and when, must not depend on what they say.

    Args:
        ledgers: Files of ledgers, or exports, of different validators.
        alpha: Bound on the chance that this decision accuses an honest node; that of the ledgers when None.
        beta: Bound on the chance that this decision calls a cheater honest; that of the ledgers when None.

    Returns:
        What the ledgers say together, by key, model, build and preset.

    Raises:
        UsageError: No ledger or the same one twice was given, or the ledgers have different error rates.
        DataError: A file is no ledger, or has been tampered with.
        StorageError: A file cannot be read.
    """
    paths = [Path(path) for path in ledgers]
    if not 1 <= len(paths) <= MOST_LEDGERS:
        raise UsageError(f"{len(paths)} ledgers", wanted=f"1 to {MOST_LEDGERS}", do="name the files of some")
    with ExitStack() as stack:
        sources = [stack.enter_context(open_source(path)) for path in paths]
        begun = [_checked(source) for source in sources]
        _refuse_twice(paths, begun)
        rates = {
            "alpha": _rate("alpha", alpha, [genesis.alpha for genesis in begun]),
            "beta": _rate("beta", beta, [genesis.beta for genesis in begun]),
        }
        shares: dict[Account, dict[str, LedgerShare]] = {}
        for source, genesis in zip(sources, begun, strict=True):
            for account, share in _stopped(source, genesis, rates, len(paths)):
                shares.setdefault(account, {})[genesis.id] = share
    ids = [genesis.id for genesis in begun]
    return [_decide(account, ids, shares[account], rates) for account in sorted(shares)]


def _checked(source: Source) -> Genesis:
    """Audit a ledger and return its beginning."""
    found = source.audit()
    if found.faults:
        raise DataError(
            f"{source.path}: {found.faults[0]}",
            wanted="a ledger that nobody has changed",
            do="leave it out, or ask its validator for it again",
        )
    if found.accounts > MOST_ACCOUNTS:
        raise DataError(
            f"{source.path}: {found.accounts} accounts", wanted=f"at most {MOST_ACCOUNTS}", do="leave it out"
        )
    with source.database.read() as connection:
        text = connection.execute(sa.select(LEDGER.c.genesis)).scalar_one()
    return Genesis.parse(text, str(source.path))


def _refuse_twice(paths: Sequence[Path], begun: Sequence[Genesis]) -> None:
    ids = [genesis.id for genesis in begun]
    for place, one in enumerate(ids):
        if one in ids[:place]:
            raise UsageError(
                f"{paths[ids.index(one)]} and {paths[place]}, which are one ledger",
                wanted="ledgers of different validators",
                do="leave the older one out",
            )


def _rate(name: str, given: float | None, rates: Sequence[float]) -> float:
    if given is None and len(set(rates)) > 1:
        raise UsageError(
            f"ledgers with {name} {' and '.join(f'{rate:g}' for rate in sorted(set(rates)))}",
            wanted=f"one {name} for the decision",
            do=f"pass --{name} {min(rates):g}",
        )
    rate = rates[0] if given is None else given
    if not 0 < rate < 1:
        raise UsageError(f"--{name} {rate:g}", wanted="a chance in (0, 1)", do=f"pass --{name} {rates[0]:g}")
    return rate


def _stopped(
    source: Source, genesis: Genesis, rates: dict[str, float], ledgers: int
) -> Iterator[tuple[Account, LedgerShare]]:
    """Yield every account of a ledger with what it adds, from its evidence."""
    query = sa.select(UPDATES.c.entry).order_by(UPDATES.c.account, UPDATES.c.seq)
    with source.database.read() as connection:
        rows = connection.execute(query, execution_options={"yield_per": AT_ONCE}).scalars()
        for account, entries in groupby((Entry.parse(text, str(source.path)) for text in rows), attrgetter("account")):
            life = StoppedLife(**rates, ledgers=ledgers)
            for entry in entries:
                entry.give(life, read_noise(connection, entry.law))
            log_e, log_honest = life.stopped
            share = LedgerShare(ledger=genesis.id, n=life.evidence.n, log_e_value=log_e, log_evidence_honest=log_honest)
            yield account, share


class StoppedLife(Life):
    """A life whose tests stop, for `stopped`, after the first audit at which each would decide alone.

    Args:
        alpha: Bound on the chance that an honest node is ever accused.
        beta: Bound on the chance that a node that cheats is ever called honest while it does.
        ledgers: Number of ledgers that the decision is made from.
    """

    def __init__(self, *, alpha: float, beta: float, ledgers: int) -> None:
        super().__init__(alpha=alpha, beta=beta)
        self._levels = (math.log(ledgers / alpha), math.log(ledgers / beta))
        self._stopped: list[list[float]] = []

    def update(self, noise: AnyNoise, residuals: Residuals, **about: Any) -> Self:
        """Take the residuals of one audit, as `Life` does."""
        super().update(noise, residuals, **about)
        self._stopped += [[0.0, 0.0] for _ in self.tests[len(self._stopped) :]]
        for test, stopped in zip(self.tests, self._stopped, strict=True):
            for which, log in enumerate((test.log_e, test.log_honest)):
                if test.log_weight + stopped[which] < self._levels[which]:
                    stopped[which] = log
        return self

    @property
    def stopped(self) -> tuple[float, float]:
        """Logarithms of the e-value and of the evidence for honesty.

        Both have mean 1 at most, the one under honest noise and the other under a cheat, because each test stops by a
        rule that looks at this test alone. So they can be averaged over ledgers.
        """
        both = [(test.log_weight, *stopped) for test, stopped in zip(self.tests, self._stopped, strict=True)]
        return (
            log_average([(weight, log_e) for weight, log_e, _ in both]),
            log_average([(weight, log_honest) for weight, _, log_honest in both[-2:]]),
        )


def _decide(
    account: Account, ledgers: Sequence[str], found: dict[str, LedgerShare], rates: dict[str, float]
) -> MergedStanding:
    shares = tuple(found.get(ledger, LedgerShare(ledger=ledger)) for ledger in ledgers)
    log_e = log_mean([share.log_e_value for share in shares])
    log_honest = log_mean([share.log_evidence_honest for share in shares])
    return MergedStanding(
        account=account,
        verdict=decide(log_e, log_honest, **rates),
        log_e_value=log_e,
        log_evidence_honest=log_honest,
        shares=shares,
    )


def log_mean(logs: Sequence[float]) -> float:
    """Return the logarithm of the average of numbers that are given by their logarithms."""
    return float(np.logaddexp.reduce(logs)) - math.log(len(logs))
