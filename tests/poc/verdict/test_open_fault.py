"""No surface calls a life honest, or ends with 0 for it, while a fault is open."""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from assay.cli import run
from assay.poc import Noise, Round, prove
from assay.poc.verdict import Account, Ledger, Life
from assay.poc.verdict.entries import LedgerUpdate
from assay.poc.verdict.ledger_audit import read_export
from assay.poc.verdict.ledger_tables import open_database, read_noise
from tests.poc.validator.conftest import body_of, pins_text, proof_of, validating  # noqa: F401
from tests.usual import usual
from tests.waiting import until

PER_AUDIT = 128
SOUND = 2
AUDITS = 6
"""Audits of a life, all in one pool: the first are sound, so the life is honest by its share."""
KEY = "node_A"
OLD_LEDGER = Path(__file__).parents[2] / "vectors" / "first" / "faulty_ledger.jsonl"


def called(positions: np.ndarray, number: int) -> np.ndarray:
    """Half of the places are off."""
    return (positions % 16 < 8) & (number >= SOUND)


def suspected(positions: np.ndarray, number: int) -> np.ndarray:
    """One audit is off at even places, later ones at a fifth of them: no fault by its median."""
    chance = {SOUND: 1.0}.get(number, 0.2 * (number > SOUND))
    return (positions % 2 == 0) & (np.random.default_rng(number).random(PER_AUDIT) < chance)


def updates(account: Account, noise: Noise, is_off: Callable[..., np.ndarray]):
    """Yield the audits of a life with an open fault."""
    rng = np.random.default_rng(0)
    for number in range(AUDITS):
        positions = PER_AUDIT * number + np.arange(PER_AUDIT)
        sizes = noise.size * np.exp(0.3 * rng.standard_normal(PER_AUDIT))
        off = np.where(is_off(positions, number), 30.0, 1.0)
        yield LedgerUpdate(
            account=account,
            round=f"{number}",
            block_hash=f"{number}",
            noise=noise,
            nonces=positions.tolist(),
            residuals=np.minimum(off * sizes, 2.0).tolist(),
            batch_size=16,
        )


@dataclass(frozen=True)
class Case:
    """A ledger with an open fault, and a proof of the same account that matches."""

    ledger: Path
    proof: Path
    flags: tuple[object, ...]
    noise: Noise


@pytest.fixture(scope="module")
def proofs(small_model, tmp_path_factory) -> dict[str, Path]:
    """Honest proofs of one key, by block."""
    folder = tmp_path_factory.mktemp("proofs")
    for block in ("b", "c"):
        round = Round(block_hash=block, public_key=KEY, seq_len=16, model="small")
        prove(small_model, round, range(48), batch_size=8).save(folder / f"{block}.jsonl")
    return {block: folder / f"{block}.jsonl" for block in ("b", "c")}


@pytest.fixture(params=usual([called, suspected], called))
def case(request, proofs, small_checkpoint, tmp_path) -> Case:
    path = tmp_path / "ledger.sqlite3"
    known = ("--public-key", KEY, "--seq-len", 16, "--nonces", "0:48", "--ledger", path)
    flags = ("--model", small_checkpoint, "--device", "cpu", *known)
    verify = ("poc", "verify", proofs["b"], *flags, "--block-hash", "b")
    assert run([*map(str, verify)]) == 0
    with Ledger(path) as ledger:
        (standing,) = ledger.standings()
        (entry,) = ledger.entries(standing.account)
        database = open_database(path, read_only=True)
        with database.read() as connection:
            noise = read_noise(connection, entry.law)
        database.close()
        last = ledger.append(updates(standing.account, noise, request.param))[-1]
    assert last.evidence.share <= 0.2  # by this number alone it would be honest
    return Case(path, proofs["c"], flags, noise)


def of_life(case: Case, capsys) -> Iterator[object]:
    life = Life(alpha=1e-3, beta=1e-2)
    with Ledger(case.ledger, read_only=True) as ledger:
        (standing,) = ledger.standings()
        for entry in ledger.entries(standing.account):
            positions = entry.positions or entry.nonces
            life.update(
                case.noise,
                [*map(float, entry.residuals)],
                block=entry.block_hash,
                positions=positions,
                batch_size=entry.batch_size,
            )
    yield life.evidence.verdict


def of_standing(case: Case, capsys) -> Iterator[object]:
    with Ledger(case.ledger, read_only=True) as ledger:
        (standing,) = ledger.standings()
        *_, entry = ledger.entries(standing.account)
    assert standing.payable == 0.0
    yield from (standing.verdict, standing.as_dict()["verdict"], entry.verdict)
    yield entry.outcome.verdict


def of_show(case: Case, capsys) -> Iterator[object]:
    assert run(["poc", "ledger", "show", str(case.ledger)]) == 0
    *_, row, _ = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    yield row.split()[-1]
    run(["poc", "ledger", "show", str(case.ledger), "--public-key", KEY, "--json"])
    (account,) = json.loads(capsys.readouterr().out)["accounts"]
    assert account["payable"] == 0.0
    yield from (account["verdict"], account["entries"][-1]["verdict"])


def of_verify(case: Case, capsys) -> Iterator[object]:
    words = [*map(str, ("poc", "verify", case.proof, *case.flags, "--block-hash", "c"))]
    assert run([*words, "--json"]) == 2
    yield json.loads(capsys.readouterr().out)["life"]["verdict"]
    assert run(words) == 2
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "whole life" in line]
    yield row.split("whole life")[1].split(",")[0].strip()


def of_export(case: Case, capsys) -> Iterator[object]:
    out = case.ledger.with_suffix(".jsonl")
    assert run(["poc", "ledger", "export", str(case.ledger), "-o", str(out)]) == 0
    *_, entry, _ = map(json.loads, out.read_text().splitlines())
    yield entry["outcome"]["verdict"]


def of_sql(case: Case, capsys) -> Iterator[object]:
    with closing(sqlite3.connect(case.ledger)) as database:
        query = "SELECT verdict FROM evidence ORDER BY seq DESC LIMIT 1"
        yield from database.execute(query).fetchone()


def of_audit(case: Case, capsys) -> Iterator[object]:
    """It says whether the file is as it was written, and of no life anything."""
    assert run(["poc", "ledger", "audit", str(case.ledger)]) == 0
    assert "honest" not in capsys.readouterr().out
    yield "faulty"


SURFACES = (of_life, of_standing, of_show, of_verify, of_export, of_sql, of_audit)


@pytest.mark.parametrize("surface", SURFACES)
def test_a_life_with_an_open_fault_is_faulty_on_every_surface(surface, case, capsys):
    capsys.readouterr()
    assert {*surface(case, capsys)} == {"faulty"}


def test_entries_that_called_such_a_life_honest_are_shown_as_faulty(tmp_path, capsys):
    path = tmp_path / "old.sqlite3"
    database = open_database(path)
    read_export(OLD_LEDGER, database)
    database.close()
    run(["poc", "ledger", "show", str(path), "--public-key", KEY, "--json"])
    (account,) = json.loads(capsys.readouterr().out)["accounts"]
    assert account["verdict"] == "faulty"
    beside_faults = [entry for entry in account["entries"] if entry["fault"]]
    assert "honest" in {entry["outcome"]["verdict"] for entry in beside_faults}
    assert {entry["verdict"] for entry in beside_faults} == {"faulty"}


def half_off(body: dict) -> dict:
    """Distances that are off at every second position of the node's sequence."""
    is_off = [((nonce - body["node_id"]) // 3) % 8 < 4 for nonce in body["nonces"]]
    return body | {"dist": [d - 0.004 * off for d, off in zip(body["dist"], is_off, strict=True)]}


@pytest.mark.slow
def test_every_reply_of_a_validator_calls_it_faulty(validating, small_model):  # noqa: F811
    pins = pins_text(small_model).replace('batch_size = "*"', "batch_size = 8")
    with validating(pins=pins) as running:
        sound = body_of(proof_of(small_model, KEY, range(300)))
        running.send(sound)
        until(lambda: running.verdict(KEY) == "honest", said=lambda: running.node(KEY))
        running.send_lies(KEY, half_off, range(300, 1500))
        until(lambda: running.verdict(KEY) == "faulty", said=lambda: running.node(KEY))
        node = running.node(KEY)
        assert node["payable"] == 0.0
        assert running.get("/status")["verdicts"].get("honest", 0) == 0
        *_, change = running.get("/verdicts")["verdicts"]
        *_, entry = running.get(f"/evidence/{change['account']}", limit=1000)["entries"]
        words = {node["verdict"], change["verdict"], entry["outcome"]["verdict"]}
        metrics = running.client.get("/metrics").text
    assert words == {"faulty"}
    assert 'assay_validator_nodes{verdict="honest"} 0' in metrics
    assert 'assay_validator_nodes{verdict="faulty"} 1' in metrics
