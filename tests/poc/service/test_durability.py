"""What is on disk: restarts, conflicts, full disks, many nodes, migrations."""

import fcntl

import numpy as np
import pytest

from assay.errors import StorageError
from assay.files.sqlite import Database
from assay.poc.protocol.records import Record
from assay.poc.service.database import open_database
from assay.poc.service.rounds import LARGEST_CALLBACK, ComputedBatch
from tests.poc.service.conftest import ARTIFACTS, BLOCK, FULL, PREFIX, ROUND, cap, execute, failing
from tests.waiting import until
from tests.wordings import refuses


def nonces_on_disk(service) -> list[int]:
    return [nonce for (nonce,) in service.sql("SELECT nonce FROM records ORDER BY nonce")]


@pytest.mark.parametrize("then", ["init/generate", "init/validate", "init", "stop"])
def test_a_restart_returns_to_state_and_round(service, then):
    service.generate(8)
    if then != "init/generate":
        service.post("/stop")
    if then.startswith("init") and then != "init/generate":
        service.post(f"/{then}", ROUND)
    before = service.status()
    service.restart()
    after = service.status()
    assert {name: after[name] for name in ("state", "config", "r_target")}.items() <= before.items()
    assert after["total_checked"] >= before["total_checked"]
    if then == "init/generate":
        until(lambda: service.checked() > after["total_checked"])
    service.post("/stop")
    found = nonces_on_disk(service)
    assert found == list(range(len(found)))
    until(lambda: service.client.get(f"{PREFIX}/snapshot").json()["checked"] == len(found))
    histogram = service.client.get(f"{PREFIX}/snapshot").json()["histogram"]
    assert sum(histogram["counts"]) + histogram["below"] + histogram["above"] == len(found)


@pytest.mark.parametrize(
    "change",
    [
        {"r_target": 1.4},
        {"seq_len": 8},
        {"batch_size": 8},
        {"block_height": 8},
        {"node_count": 2},
        {"n_groups": 2},
    ],
)
def test_a_round_cannot_be_begun_again_with_other_values(service, change):
    service.post("/init", ROUND)
    answer = service.post("/init/generate", ROUND | change, status=409)
    assert answer["fields"] == list(change)
    assert service.status()["state"] == "IDLE"
    service.post(
        "/init/generate", ROUND | {"callback_url": "http://127.0.0.1:9/", "fraud_threshold": 0.05}
    )


def test_a_full_database_pauses_with_a_clear_state_and_continues(service):
    service.generate(1)
    limit = cap(service.controller.database)
    until(lambda: service.status()["paused"] == "storage")
    held = service.status()
    assert held["state"] == "GENERATING"
    assert service.client.get("/health").status_code == 200
    answer = service.client.post(
        f"{PREFIX}/generate", json=ARTIFACTS | {"nonces": list(range(10_000))}
    )
    assert answer.status_code == 503
    assert "retry-after" in answer.headers
    limit[0] = 2**30
    until(lambda: service.status()["paused"] is None and service.checked() > held["total_checked"])
    service.post("/stop")
    found = nonces_on_disk(service)
    assert found == list(range(service.checked()))


@pytest.mark.slow
def test_stop_works_with_a_full_disk_and_is_remembered_later(service, monkeypatch):
    service.generate(1)
    full = failing(monkeypatch, Database, "write", FULL)
    until(lambda: service.status()["paused"] == "storage")
    assert service.post("/stop")["pow_status"]["state"] == "STOPPED"
    assert service.controller.rounds.current()[0] == "GENERATING"
    full.clear()
    until(lambda: service.controller.rounds.current()[0] == "STOPPED")


@pytest.mark.slow
def test_results_that_collide_end_the_round_and_are_neither_counted_nor_announced(service):
    service.generate(1, {"callback_url": "http://127.0.0.1:9/"})
    service.sql("INSERT INTO records SELECT round_id, 1000, 1.4, NULL, 1 FROM records LIMIT 1")
    until(lambda: service.status()["state"] == "STOPPED")
    assert "UNIQUE" in service.status()["error"]
    told = (
        "(SELECT checked FROM rounds), (SELECT valid FROM rounds), (SELECT sum(nonces) FROM outbox)"
    )
    [found] = service.sql(f"SELECT count(*), sum(valid), {told} FROM records WHERE nonce != 1000")
    checked, valid, *others = found
    assert others == [checked, valid, valid]
    assert nonces_on_disk(service) == [
        *range(checked),
        1000,
    ]  # nothing that was computed later, after a gap


@pytest.mark.parametrize("kind", ["distance", "vector"])
def test_no_callback_is_larger_than_receivers_take(service, kind):
    """A validator takes 65 536 nonces and 1 MiB, whatever a node collects."""
    service.post("/init", ROUND | {"callback_url": "http://127.0.0.1:9/"})
    values = {"distance": 1.4142135} if kind == "distance" else {"vector": np.zeros(32, "<f2")}
    records = [Record(2**50 + nonce, **values) for nonce in range(70_000)]
    batch = ComputedBatch(0, 1, records, [True] * len(records), 70_000, 1.0)
    service.controller.rounds.commit([batch], interval=600.0, most=70_000)
    bodies = [body for _, body in service.controller.outbox.due(100)]
    assert bodies
    assert max(map(len, bodies)) <= LARGEST_CALLBACK


def test_a_database_of_a_newer_version_is_refused(tmp_path):
    open_database(tmp_path).close()
    execute(tmp_path / "service.sqlite3", "INSERT INTO migrations VALUES (99, 0)")
    with refuses(StorageError, "a database of a newer version is refused"):
        open_database(tmp_path)
    with (tmp_path / "service.sqlite3").open() as file:  # a file that is refused is not locked
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_commits_are_durable(tmp_path):
    database = open_database(tmp_path)
    with database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
    database.close()


def test_old_rounds_are_pruned_unless_they_owe_a_callback(service):
    for block, url in (("old", None), ("owing", "http://127.0.0.1:9/"), ("current", None)):
        service.post("/init/generate", ROUND | {"block_hash": block, "callback_url": url})
        until(lambda: service.status()["total_valid"] > 0)
        service.post("/stop")
    assert service.controller.rounds.prune(keep=3600) == 0
    assert service.controller.rounds.prune(keep=-1) == 1
    assert service.sql("SELECT block_hash FROM rounds ORDER BY id") == [("owing",), ("current",)]
    assert service.sql(
        "SELECT count(*) FROM records WHERE round_id NOT IN (SELECT id FROM rounds)"
    ) == [(0,)]


@pytest.mark.parametrize(
    ("begin", "call"), [("/init/generate", "/phase/generate"), ("/init/validate", "/validate")]
)
def test_a_round_of_another_model_neither_continues_nor_judges(service, begin, call):
    """Honest distances of that model are others than this model has: they would be taken for
    fraud.
    """
    service.post(begin, ROUND)
    service.close()
    service.sql("UPDATE rounds SET digest = 'another'")
    service.start()
    until(lambda: service.controller.loaded.done())
    assert service.status()["state"] == ("STOPPED" if call == "/phase/generate" else "VALIDATING")
    claim = BLOCK | {"node_id": 0, "nonces": [0], "dist": [1.4]}
    assert "a round of fake" in service.post(call, claim, status=409)["detail"]
    service.post(begin, ROUND | {"block_hash": "next"})
