"""Artifact rounds and jobs: queue, polling, waiting, cancelling, checking."""

import json
import sqlite3
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import sqlalchemy as sa

from assay.files.sqlite import Database
from assay.poc.protocol.records import decode_vector, encode_vector
from assay.poc.service.outbox import open_outbox
from tests.end_to_end.receiver import FlakyReceiver
from tests.poc.service.conftest import ARTIFACTS, BLOCK, FULL, PREFIX, ROUND, failing
from tests.waiting import until

JOB = ARTIFACTS | {"nonces": [0, 1, 2, 5, 9]}


def finished(service, request_id: str):
    state = service.client.get(f"{PREFIX}/generate/{request_id}").json()
    return state if state["status"] not in ("queued", "running") else None


def ended(service, queued: dict) -> dict:
    """Wait for the end of a job."""
    until(lambda: finished(service, queued["request_id"]))
    return finished(service, queued["request_id"])


def run(service, body) -> dict:
    queued = service.post("/generate", body)
    assert queued["status"] == "queued"
    return ended(service, queued)


def test_a_job_is_queued_polled_and_completed(service):
    done = run(service, JOB)
    assert done["status"] == "completed"
    assert done["encoding"] == {"dtype": "f16", "k_dim": 12, "endian": "le"}
    assert [artifact["nonce"] for artifact in done["artifacts"]] == JOB["nonces"]
    assert {len(artifact["vector_b64"]) for artifact in done["artifacts"]} == {32}


def test_validation_counts_what_is_wrong(service):
    artifacts = run(service, JOB)["artifacts"]
    honest = service.post(
        "/generate", JOB | {"wait": True, "validation": {"artifacts": artifacts[::-1]}}
    )
    assert (honest["n_total"], honest["n_mismatch"], honest["fraud_detected"]) == (5, 0, False)
    assert honest["p_value"] == 1.0
    spoiled = [
        artifacts[0],
        artifacts[1] | {"vector_b64": artifacts[0]["vector_b64"]},
        artifacts[2] | {"vector_b64": ""},
        artifacts[3] | {"vector_b64": "not base64"},
        artifacts[4] | {"vector_b64": "AH4A" * 8},  # NaN
    ]
    fraud = service.post("/generate", JOB | {"wait": True, "validation": {"artifacts": spoiled}})
    assert fraud["mismatch_nonces"] == [1, 2, 5, 9]
    assert (fraud["n_mismatch"], fraud["fraud_detected"]) == (4, True)
    loose = {"stat_test": {"dist_threshold": 2.0, "p_mismatch": 0.5, "fraud_threshold": 0.001}}
    lenient = service.post(
        "/generate", JOB | loose | {"wait": True, "validation": {"artifacts": spoiled}}
    )
    assert (lenient["mismatch_nonces"], lenient["fraud_detected"]) == ([2, 5, 9], False)


@pytest.mark.parametrize("nonces", [[0, 1, 2, 5], [0, 1, 2, 5, 8], [0, 1, 2, 5, 9, 9]])
def test_validation_of_other_nonces_is_refused(service, nonces):
    artifacts = [{"nonce": nonce, "vector_b64": ""} for nonce in nonces]
    service.post("/generate", JOB | {"validation": {"artifacts": artifacts}}, status=400)


def test_jobs_that_cannot_be_are_refused(service):
    for change in ({"seq_len": 8}, {"model": "another"}, {"k_dim": 64}):
        answer = service.post("/generate", JOB | {"params": JOB["params"] | change}, status=409)
        assert answer["error"] == "params mismatch"
        assert (answer["deployed"], answer["requested"]) == (JOB["params"], JOB["params"] | change)
    bad = [{"nonces": nonces} for nonces in ([], [1, 1], list(range(10_001)))] + [
        {"nonces": [1], "node_count": 2}
    ]
    for change in (*bad, {"batch_size": 5000}, {"params": JOB["params"] | {"extra": 1}}):
        service.post("/generate", JOB | change, status=422)


def test_a_full_queue_asks_to_come_back(serving):
    with serving(max_queued_nonces=20) as service:
        service.rig.open.clear()
        first = service.post("/generate", JOB)
        assert service.post("/generate", JOB)["queued_count"] == 10
        answer = service.client.post(f"{PREFIX}/generate", json=JOB)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        service.rig.open.set()
        until(lambda: finished(service, first["request_id"]))
        until(lambda: service.client.post(f"{PREFIX}/generate", json=JOB).status_code == 200)


def test_a_long_queue_is_counted_while_a_round_is_written(serving):
    """A client that asked again and again held up the rounds and receipts of all."""
    with serving(max_queued_nonces=4) as service:
        statuses = []

        def ask() -> None:
            statuses.append(service.client.post(f"{PREFIX}/generate", json=JOB).status_code)

        asking = threading.Thread(target=ask)
        with service.controller.database.write():
            asking.start()
            until(lambda: statuses)
        asking.join()
        assert statuses == [429]


@pytest.mark.parametrize("bound", [{"max_queued_nonces": 20}, {"max_pending_jobs": 4}])
def test_one_key_cannot_hold_the_whole_queue_or_all_callbacks(serving, bound):
    keys = ("first-" + "x" * 20, "second-" + "x" * 20)
    first, second = ({"Authorization": f"Bearer {key}"} for key in keys)
    with serving(
        **bound, validate_keys=keys, callback_backoff=600, callback_backoff_max=600, drain=0.5
    ) as service:
        service.rig.open.clear()

        def queue(headers: dict[str, str]) -> int:
            job = JOB if "max_queued_nonces" in bound else JOB | {"url": "http://127.0.0.1:9"}
            return service.client.post(f"{PREFIX}/generate", json=job, headers=headers).status_code

        assert [queue(first) for _ in range(3)] == [200, 200, 429]  # five nonces each
        if "max_pending_jobs" in bound:
            service.rig.open.set()
            until(lambda: service.sql("SELECT count(*) FROM outbox WHERE attempts > 0") == [(2,)])
        service.restart()
        spelled = {"Authorization": first["Authorization"].replace("Bearer ", "bearer   ")}
        assert (queue(spelled), queue(second)) == (429, 200)
        service.rig.open.set()
    if "max_pending_jobs" in bound:  # those of clients wait for those of the operator
        service.sql(
            "UPDATE outbox SET next_attempt_at = 0, client = nullif(client, (SELECT max(client) "
            "FROM outbox))"
        )
        with open_outbox(service.settings.data_dir) as outbox:
            assert [(outbox.due(9)[0][0].id,)] == service.sql(
                "SELECT id FROM outbox WHERE client IS NULL LIMIT 1"
            )


def test_jobs_wait_for_a_round_and_survive_a_restart(service):
    service.post("/init/generate", ROUND)
    queued = service.post("/generate", JOB)
    until(lambda: service.checked() > 20)
    assert finished(service, queued["request_id"]) is None
    service.restart()
    assert finished(service, queued["request_id"]) is None
    service.post("/stop")
    assert ended(service, queued)["status"] == "completed"


def test_a_job_that_another_version_stored_fails_by_name_and_the_next_one_runs(service):
    service.post("/init/generate", ROUND)  # jobs wait for it
    old = service.post("/generate", JOB)
    new = service.post("/generate", JOB | {"nonces": [9]})
    service.sql("UPDATE jobs SET request = '{}' WHERE id = ?", [old["request_id"]])
    service.post("/stop")
    assert ended(service, new)["status"] == "completed"
    assert "stored by another version" in finished(service, old["request_id"])["error"]


@pytest.mark.parametrize("checks", [False, True])
def test_a_job_of_another_checkpoint_is_neither_computed_nor_judged(service, checks, monkeypatch):
    """Honest vectors of that model are others than this model has: they were called fraud."""
    artifacts = run(service, JOB)["artifacts"]
    service.post("/init/generate", ROUND)  # jobs wait for it
    body = JOB | ({"validation": {"artifacts": artifacts}} if checks else {})
    queued = service.post("/generate", body)
    service.close()
    deployment = service.rig.deployment
    monkeypatch.setattr(service.rig, "deployment", lambda: replace(deployment(), digest="1" * 64))
    service.start()
    until(lambda: service.controller.loaded.done())
    service.post("/stop")
    end = ended(service, queued)
    assert (end["status"], end["error"]) == ("failed", "a job of the model 000000000000")
    assert run(service, body)["status"] == "completed"


def test_a_job_whose_engine_ends_with_the_service_is_done_again_after_the_next_start(service):
    service.rig.open.clear()
    queued = service.post("/generate", JOB)
    assert service.rig.entered.wait(10)
    service.controller.closing.set()  # as inside vLLM, whose engine ends before the application
    service.rig.fail = RuntimeError("the engine has ended")
    service.rig.open.set()
    until(lambda: service.rig.batches == 1)
    service.close()
    service.rig.fail = None
    service.start()
    service.wait_ready()
    assert len(ended(service, queued)["artifacts"]) == 5


def test_waiting_too_long_is_answered_with_202(serving):
    with serving(wait=0.05) as service:
        service.rig.open.clear()
        answer = service.client.post(f"{PREFIX}/generate", json=JOB | {"wait": True})
        assert answer.status_code == 202
        assert answer.json()["status"] in ("queued", "running")
        service.rig.open.set()
        until(lambda: finished(service, answer.json()["request_id"]))


def test_a_job_can_be_cancelled(service):
    service.rig.open.clear()
    running, waiting = (service.post("/generate", JOB)["request_id"] for _ in range(2))
    assert service.rig.entered.wait(10)
    for request_id in (waiting, running):
        answer = service.client.delete(f"{PREFIX}/generate/{request_id}")
        assert answer.json()["status"] == "cancelled"
    service.rig.open.set()
    assert run(service, JOB)["status"] == "completed"
    assert finished(service, running)["status"] == "cancelled"


def test_more_jobs_than_a_statement_takes_values_are_cancelled(service):
    """SQLite takes 32 766 in a statement, and builds of it more or fewer."""
    service.rig.open.clear()
    jobs = service.controller.jobs
    queued = [service.post("/generate", JOB | {"nonces": [nonce]}) for nonce in range(20)]

    def few_values(connection, record, proxy) -> None:
        connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 16)

    with service.controller.database.write() as connection:
        pool = connection.engine.pool
    sa.event.listen(pool, "checkout", few_values)
    jobs.cancel_open()
    assert jobs.counts() == {"queued": 0, "running": 0}
    assert {finished(service, job["request_id"])["status"] for job in queued} == {"cancelled"}


def test_what_a_job_asked_is_not_kept_and_no_vector_is_larger_than_a_record(service):
    """Cancelled at once, jobs of one nonce would fill the disk."""
    service.rig.open.clear()
    large = {"nonce": 0, "vector_b64": "A" * 65_536}
    sent = {"artifacts": [large] * 10 + [large | {"nonce": 1, "vector_b64": ""}]}
    body = ARTIFACTS | {"nonces": [0, 1], "validation": sent}
    path = "/api/v1/inference/pow/generate"
    queued = [service.client.post(path, json=body).json() for _ in range(2)]
    (size,) = service.sql("SELECT max(length(request)) FROM jobs")[0]
    assert size < 1000
    service.client.delete(f"{PREFIX}/generate/{queued[1]['request_id']}")
    service.rig.open.set()
    counted = ended(service, queued[0])
    assert (counted["n_mismatch"], counted["mismatch_nonces"]) == (2, [0, 1])
    assert service.sql("SELECT DISTINCT request FROM jobs") == [("{}",)]


def test_results_are_kept_for_a_while_only(serving):
    with serving(job_ttl=0.3) as service:
        queued = service.post("/generate", JOB)
        until(
            lambda: (
                service.client.get(f"{PREFIX}/generate/{queued['request_id']}").status_code == 404
            )
        )
        assert service.client.get(f"{PREFIX}/generate/unknown").status_code == 404
        time.sleep(0.3)
        service.controller.jobs.prune()
        assert service.controller.jobs.counts() == {"queued": 0, "running": 0}


def test_a_job_that_fails_says_so_and_the_next_one_runs(service):
    service.rig.fail = RuntimeError("the device is gone")
    failed = run(service, JOB)
    assert failed["status"] == "failed"
    assert "device is gone" in failed["error"]
    waited = service.post("/generate", JOB | {"wait": True})
    assert waited | {"request_id": failed["request_id"]} == failed
    service.rig.fail = None
    assert run(service, JOB)["status"] == "completed"


def test_jobs_announce_their_results(service):
    with FlakyReceiver(trouble=0) as receiver:
        done = run(service, JOB | {"url": receiver.url})
        checked = run(
            service, JOB | {"url": receiver.url, "validation": {"artifacts": done["artifacts"]}}
        )
        until(lambda: len(receiver.taken) == 2)
        # Deliveries come in any order.
        bodies = {path: json.loads(body) for path, _, body in receiver.requests}
    common = {**BLOCK, "node_id": 0}
    assert bodies["/generated"] == common | {
        name: done[name] for name in ("request_id", "artifacts", "encoding")
    }
    names = ("request_id", "n_total", "n_mismatch", "mismatch_nonces", "p_value", "fraud_detected")
    assert bodies["/validated"] == common | {name: checked[name] for name in names}


def test_a_round_of_vectors(service):
    with FlakyReceiver(trouble=0) as receiver:
        answer = service.post(
            "/init/generate", ARTIFACTS | {"url": receiver.url, "group_id": 1, "n_groups": 2}
        )
        assert answer["pow_status"]["status"] == "GENERATING"
        until(lambda: len(receiver.taken) >= 2)
        service.post("/stop")
        until(lambda: service.controller.outbox.counts()["pending"] == 0)
    status = service.status()
    share = {"node_id": 0, "node_count": 1, "group_id": 1, "n_groups": 2}
    assert status["config"] == BLOCK | share | {"seq_len": 4, "k_dim": 12}
    assert status["stats"]["total_processed"] == status["total_valid"]
    sent = [artifact for body in receiver.taken.values() for artifact in body["artifacts"]]
    assert sorted(a["nonce"] for a in sent) == list(range(1, 1 + 2 * status["total_checked"], 2))
    direct = {
        a["nonce"]: a["vector_b64"] for a in run(service, JOB | {"nonces": [1, 3, 5]})["artifacts"]
    }
    assert direct.items() <= {a["nonce"]: a["vector_b64"] for a in sent}.items()
    service.post("/phase/validate")
    claim = BLOCK | {"nonces": [1], "dist": [1.4], "node_id": 0}
    assert "vectors" in service.post("/validate", claim, status=409)["detail"]


LONGER = ARTIFACTS["params"] | {"seq_len": 8}


def test_a_hardened_job_is_judged_by_the_residual_test(serving):
    with serving(seq_len=8) as service:
        params = LONGER | {"preset": "hardened", "k_dim": 32}
        many = JOB | {"params": params, "nonces": list(range(40)), "wait": True}
        artifacts = service.post("/generate", many)["artifacts"]
        published = service.post("/generate", many | {"params": LONGER})["artifacts"]
        assert artifacts != published
        honest = service.post("/generate", many | {"validation": {"artifacts": artifacts}})
        assert (honest["fraud_detected"], honest["residual_test"]["verdict"]) == (False, "honest")
        # Residuals under the published threshold, which the count takes for honest, and far over
        # honest noise.
        near = []
        for artifact in artifacts:
            vector = decode_vector(artifact["vector_b64"], 32).astype(np.float32)
            moved = vector + 0.015 * np.roll(vector, 1)
            near.append(
                artifact
                | {"vector_b64": encode_vector((moved / np.linalg.norm(moved)).astype(np.float16))}
            )
        fraud = service.post("/generate", many | {"validation": {"artifacts": near}})
        assert fraud["n_mismatch"] == 0
        assert (fraud["fraud_detected"], fraud["residual_test"]["verdict"]) == (True, "fraud")


def test_a_job_that_failed_on_a_full_disk_is_not_completed_with_a_part(service, monkeypatch):
    service.rig.open.clear()
    queued = service.post("/generate", JOB)
    assert service.rig.entered.wait(10)
    full = failing(monkeypatch, Database, "write", FULL)
    service.rig.fail = RuntimeError("the device is gone")
    service.rig.open.set()
    until(lambda: service.rig.batches == 1 and not service.rig.returned)
    assert finished(service, queued["request_id"]) is None
    full.clear()
    failed = ended(service, queued)
    assert (failed["status"], "artifacts" in failed) == ("failed", False)


def test_a_job_outlasts_a_full_disk(service, monkeypatch):
    service.rig.open.clear()
    queued = service.post("/generate", JOB)
    assert service.rig.entered.wait(10)
    full = failing(monkeypatch, Database, "write", FULL)
    service.rig.open.set()
    until(lambda: service.rig.returned == 2)
    service.rig.fail = RuntimeError("nothing may be computed twice")
    assert finished(service, queued["request_id"]) is None
    full.clear()
    assert ended(service, queued)["status"] == "completed"
