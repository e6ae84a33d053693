"""Faults that were found by attacking the service: each test fails where the fault is back."""

import asyncio
import socket
import stat
import threading
import time

import pytest

from assay.errors import EngineEnded, ProofMismatch, StorageError
from assay.poc.net import callback_urls as _callback_guard
from assay.poc.service import ServiceSettings
from assay.poc.service import rounds as _rounds
from assay.poc.service.database import open_database
from assay.poc.service.outbox import Outbox, open_outbox
from assay.poc.service.round_worker import QUEUE
from assay.poc.service.service_controller import Controller
from tests.poc.service.conftest import ARTIFACTS, BLOCK, FULL, PREFIX, ROUND, execute, failing
from tests.poc.service.test_durability import nonces_on_disk
from tests.waiting import until
from tests.wordings import refuses

DAY = 86_400.0
DEAD_END = "http://127.0.0.1:9/"


# Restarts


def test_a_start_that_fails_leaves_no_thread_and_no_lock(service, monkeypatch):
    service.close()
    full = failing(monkeypatch, Outbox, "counts", FULL)
    with pytest.raises(StorageError):
        service.start()
    assert service.controller.ended
    assert service.controller.closing.is_set()
    full.clear()
    service.start()


def test_an_engine_that_fails_while_its_round_is_ended_leaves_no_error(service, monkeypatch):
    """Its error waited for the call that ended the round, and stopped the round that came next."""
    service.generate(4)
    enter = service.controller.rounds.enter

    def enter_slowly(*values, **options):
        monkeypatch.undo()
        service.rig.fail = RuntimeError("the engine is gone")
        batches = service.rig.batches
        until(lambda: service.rig.batches > batches)
        time.sleep(0.2)  # in which the error reaches what this call holds
        service.rig.fail = None
        return enter(*values, **options)

    monkeypatch.setattr(service.controller.rounds, "enter", enter_slowly)
    service.post("/stop")
    # The engine's thread does it after all that it did before.
    service.post("/generate", ARTIFACTS | {"nonces": [0], "wait": True})
    assert service.status()["error"] is None


def test_an_engine_that_dies_with_the_service_does_not_end_the_round(service):
    """SIGTERM tears some engines down beneath their batch, and its error is not a failure of the
    round.
    """
    service.generate(8)
    service.rig.open.clear()
    service.rig.entered.clear()
    assert service.rig.entered.wait(10)
    service.controller.closing.set()
    service.rig.fail = RuntimeError("the engine is gone")
    service.rig.open.set()
    service.close()
    check_goes_on(service)


def check_goes_on(service) -> None:
    """Start a service whose engine works again: its round goes on where it was."""
    service.rig.fail = None
    service.start()
    service.wait_ready()
    status = service.status()
    assert (status["state"], status["error"]) == ("GENERATING", None)
    until(lambda: service.checked() > status["total_checked"])
    service.post("/stop")
    assert nonces_on_disk(service) == list(range(service.checked()))


def test_a_round_whose_engine_died_continues_after_the_next_start(service):
    service.generate(8)
    service.rig.fail = EngineEnded(
        "the engine died", wanted="an engine that runs", do="see the log"
    )
    until(lambda: service.status()["error"])
    assert service.status()["state"] == "GENERATING"
    service.close()
    check_goes_on(service)


def test_a_round_whose_engine_died_before_its_first_batch_ends(service):
    """A round that kills engines would end every start, and the chat that they serve as well."""
    service.rig.fail = EngineEnded(
        "the engine died", wanted="an engine that runs", do="see the log"
    )
    service.post("/init/generate", ROUND)
    until(lambda: service.status()["error"])
    assert service.status()["state"] == "STOPPED"


# Time


def test_a_round_is_used_by_every_commit_and_phase(service):
    def is_fresh() -> bool:
        return service.sql("SELECT touched_at FROM rounds")[0][0] > time.time() - 60

    service.generate(1)
    service.sql("UPDATE rounds SET touched_at = 0")
    until(is_fresh)
    service.post("/stop")
    service.sql("UPDATE rounds SET touched_at = 0")
    service.post("/phase/validate")
    assert is_fresh()


def test_a_clock_that_is_far_ahead_deletes_nothing(service, monkeypatch):
    for block in ("first", "second"):
        service.generate(1, {"block_hash": block})
        service.post("/stop")
    service.restart()
    real = time.time
    monkeypatch.setattr(_rounds.time, "time", lambda: real() + 31 * DAY)
    assert service.controller.rounds.prune(30 * DAY) == 0
    monkeypatch.undo()
    service.sql(
        "UPDATE rounds SET touched_at = touched_at - ? WHERE block_hash = 'first'", (31 * DAY,)
    )
    assert service.controller.rounds.prune(30 * DAY) == 1


# The database


def test_files_are_the_owners_alone_in_an_open_directory(service):
    service.close()
    directory = service.settings.data_dir
    directory.chmod(0o755)
    for file in directory.iterdir():
        file.chmod(0o644)
    service.start()
    service.wait_ready()
    service.post("/init", ROUND)
    modes = {
        file.name: stat.S_IMODE(file.stat().st_mode) for file in directory.glob("service.sqlite3*")
    }
    assert len(modes) == 3
    assert set(modes.values()) == {0o600}


@pytest.mark.slow
def test_the_lock_is_on_the_database_itself(tmp_path):
    database = open_database(tmp_path)
    with refuses(StorageError, "the lock is on the database itself"):
        open_database(tmp_path)
    with open_outbox(tmp_path) as beside:
        assert beside.counts()["pending"] == 0
    database.close()
    open_database(tmp_path).close()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE service SET state = 'DREAMING'",
        *("DELETE FROM service", "DROP TABLE outbox", "DROP TABLE jobs"),
        b"no",
    ],
)
def test_a_damaged_database_is_an_error_in_three_parts(rig, tmp_path, damage):
    open_database(tmp_path).close()
    path = tmp_path / "service.sqlite3"
    path.write_bytes(damage * 1000) if isinstance(damage, bytes) else execute(path, damage)
    with refuses(StorageError, "a damaged database is an error in three parts") as error:
        Controller(rig.deployment, ServiceSettings(data_dir=tmp_path))
    assert "restore" in error.value.do


# Rounds, jobs and validations


def test_the_end_of_a_share_is_said_in_words(service):
    last = 2**53 - 2
    service.post("/init/generate", ROUND | {"node_id": last - 1, "node_count": last})
    until(lambda: service.status()["state"] == "STOPPED")
    status = service.status()
    assert "the share is done" in status["error"]
    until(lambda: service.checked() == 1)
    assert nonces_on_disk(service) == [last - 1]
    service.post("/phase/generate")
    until(lambda: service.status()["state"] == "STOPPED")
    assert service.controller.metrics.failures._value.get() == 0


def test_a_round_that_failed_behind_its_callbacks_takes_another_share(serving):
    """What was computed and not written yet is of the share before, and comes first."""
    pauses = {"callback_backoff": 60, "callback_backoff_max": 60, "callback_interval": 0.0}
    body = ARTIFACTS | {"url": DEAD_END, "node_id": 1}
    with serving(compatibility="gonka", max_pending=2, callback_nonces=4, **pauses) as service:
        service.post("/init/generate", body)
        until(lambda: service.controller.paused == "callbacks")
        service.rig.fail = RuntimeError("CUDA out of memory")
        service.sql("UPDATE outbox SET status = 'delivered'")
        until(lambda: service.controller.error)
        service.rig.fail = None
        written = nonces_on_disk(service)
        service.post("/init/generate", body | {"node_id": 3, "node_count": 4, "url": None})
        service.sql("UPDATE outbox SET status = 'delivered'")
        until(lambda: len(nonces_on_disk(service)) > len(written) + 8)
        assert {nonce % 4 for nonce in nonces_on_disk(service)[len(written) :]} == {3}
        assert service.controller.error is None


def test_a_round_that_waits_for_its_receiver_ends_with_the_batch_that_runs(serving):
    """It waited as long as a batch may take, and was then ended beneath its engine."""
    pauses = {"callback_backoff": 60, "callback_backoff_max": 60, "callback_interval": 0.0}
    with serving(max_pending=2, callback_nonces=4, drain=3.0, **pauses) as service:
        service.post("/init/generate", ROUND | {"callback_url": DEAD_END})
        until(lambda: service.rig.returned * 4 > service.checked() + 4 * QUEUE)
        assert service.controller.paused == "callbacks"
        service.close()
        assert service.controller.ended
        written = nonces_on_disk(service)
        assert written == list(range(len(written)))
        service.start()


def test_verdicts_do_not_stop_a_round_and_have_a_bound(serving):
    """A validate key may not pause the operator's round, nor fill the disk without a computation."""
    with serving(max_pending=3, callback_backoff=600, callback_backoff_max=600) as service:
        service.post("/init/validate", ROUND | {"callback_url": DEAD_END})
        claim = BLOCK | {"node_id": 0}
        for _ in range(5):
            service.post("/validate", claim | {"nonces": [], "dist": []})
        assert service.sql("SELECT count(*) FROM verdicts") == [(0,)]
        for nonce in range(3):
            service.post("/validate", claim | {"nonces": [nonce], "dist": [1.4]})
        refused = service.post("/validate", claim | {"nonces": [3], "dist": [1.4]}, 429)
        assert "3 verdicts of this round are undelivered" in refused["detail"]
        service.post("/phase/generate")
        until(lambda: service.checked() >= 8)
        assert service.status()["paused"] is None


def test_callbacks_of_jobs_do_not_stop_a_round_and_have_a_bound(serving):
    with serving(
        max_pending=3, max_pending_jobs=8, callback_backoff=600, callback_backoff_max=600
    ) as service:
        job = ARTIFACTS | {"nonces": [0], "url": DEAD_END}
        for _ in range(4):
            service.post("/generate", job)
        refused = service.client.post(f"{PREFIX}/generate", json=job)
        assert (refused.status_code, "callbacks of artifact jobs" in refused.json()["detail"]) == (
            429,
            True,
        )
        service.post("/generate", job | {"url": None})
        until(lambda: service.controller.outbox.counts()["pending"] == 4)
        service.generate(21)
        assert service.status()["paused"] is None


def test_a_validation_of_another_nodes_nonces_is_refused(service):
    service.post("/init/validate", ROUND | {"node_id": 1, "node_count": 3})
    claim = BLOCK | {"nonces": [1, 4], "dist": [1.4, 1.4]}
    service.post("/validate", claim | {"node_id": 1})
    service.post("/validate", claim | {"node_id": -1})
    answer = service.post("/validate", claim | {"node_id": 2}, status=422)
    assert "nonce 1 of node 2" in answer["detail"]


def test_nonces_with_equal_input_seeds_are_refused(service, monkeypatch):
    asked = []

    def refuse(round, nonces):
        asked.append((round.public_key, list(nonces)))
        raise ProofMismatch(
            "two nonces have one seed", wanted="different seeds", do="prove other nonces"
        )

    monkeypatch.setattr("assay.poc.service.request_checks.check_distinct_seeds", refuse)
    service.post("/init/validate", ROUND)
    claim = BLOCK | {"public_key": "other", "nonces": [3, 5], "dist": [1.4, 1.4], "node_id": 0}
    assert "one seed" in service.post("/validate", claim, status=422)["detail"]
    artifacts = [{"nonce": nonce, "vector_b64": ""} for nonce in (0, 1)]
    job = ARTIFACTS | {"nonces": [0, 1], "validation": {"artifacts": artifacts}}
    assert "one seed" in service.post("/generate", job, status=422)["detail"]
    assert asked == [("other", [3, 5]), (BLOCK["public_key"], [0, 1])]


# Callbacks


def test_a_silent_name_server_holds_up_no_database_call(serving, monkeypatch):
    """Look-ups have threads of their own: with four of them waiting, a call to the database is
    answered.
    """
    silent = threading.Event()

    def wait(*args, **kwargs):
        silent.wait(30)
        raise socket.gaierror("no answer")

    monkeypatch.setattr(_callback_guard.socket, "getaddrinfo", wait)
    with serving() as service:

        async def look_up_and_read() -> dict:
            lookups = [
                asyncio.ensure_future(
                    _callback_guard.resolve(f"http://silent-{i}.example/", allow_private=False)
                )
                for i in range(64)  # more than any default executor has threads
            ]
            await asyncio.sleep(0)
            try:
                async with asyncio.timeout(10):
                    await asyncio.to_thread(lambda: None)
                    return await service.controller.call(service.controller.outbox.counts)
            finally:
                silent.set()
                await asyncio.gather(*lookups, return_exceptions=True)

        assert asyncio.run(look_up_and_read()) == {"pending": 0, "dead": 0}
