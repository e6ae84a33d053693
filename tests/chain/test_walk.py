"""Random legal sequences of calls against the service and a model of upstream's states.

``ASSAY_WALKS`` is the number of sequences, and ``ASSAY_WALKS_FROM`` the seed of the first, so that
processes can share them. `make test` walks a few, `make test-all` a hundred, and `make soak` ten
thousand.
"""

import os
import random
from typing import Any

import pytest

from tests.chain.asgi import Direct
from tests.chain.client import LEVELS, PATH
from tests.chain.mlnode import PUBLISHED
from tests.chain.states import NONCES, Upstream, draw
from tests.poc.service.conftest import Service, rig, serving  # noqa: F401
from tests.usual import tries
from tests.waiting import until

WALKS = int(os.environ.get("ASSAY_WALKS", tries(10_000, 100)))
FEW = 30
FIRST = int(os.environ.get("ASSAY_WALKS_FROM", "0"))
STEPS = 10
PATIENCE = 600.0  # a process that is stopped for a minute answers no differently after it
RESULT = {"status", "request_id"}
COMPUTED = RESULT | {"artifacts", "encoding"}
CHECKED = RESULT | {"n_total", "n_mismatch", "mismatch_nonces", "p_value", "fraud_detected"}
LISTED = {"level", "level_field"}  # fields that docs/gonka.md adds
WRONG = "A" * 32
BLOCK = {"block_hash": "B7", "block_height": 7, "public_key": "02ab"}
SHARED = BLOCK | {"node_id": 1, "node_count": 1, "params": {"model": "fake", "seq_len": 4}}


class Difference(AssertionError):
    """An answer that upstream would not give."""


class Walk:
    """One sequence of calls, under one of the two prefixes."""

    def __init__(self, service: Service, seed: int) -> None:
        self._service = service
        self._client = Direct(service)
        self._chance = random.Random(seed)
        self._prefix = (PATH, PUBLISHED)[seed % 2]
        self._upstream = Upstream()
        self._block = f"block {seed}"
        self._vectors: dict[int, str] = {}
        self._trace: list[str] = []
        count = self._chance.choice((1, 2, 8))
        self._share = {"node_id": self._chance.randint(1, count), "node_count": count}

    def run(self) -> None:
        """Make the calls; Difference at the first answer that is another than upstream's."""
        self._compute(list(range(1, 6)))
        for _ in range(STEPS):
            name = draw(self._chance)
            self._trace.append(name)
            getattr(self, f"_{name.replace(' ', '_')}")()
            self._status()
        self._stop()

    def _post(self, path: str, body: dict[str, Any], status: int) -> dict[str, Any]:
        answer = self._client.post(self._prefix + path, body)
        self._same("status code", answer.status_code, status)
        return answer.json()

    def _same(self, subject: str, ours: object, theirs: object) -> None:
        if ours != theirs:
            raise Difference(f"{subject}: {ours}, upstream {theirs}, after {self._trace}")

    def _shared(self) -> dict[str, Any]:
        block = {"block_hash": self._block, "block_height": 7, "public_key": "02ab"}
        return block | self._share | {"params": {"model": "fake", "seq_len": 4}}

    def _status(self) -> None:
        reply = self._client.get(f"{self._prefix}/status").json()
        server = reply
        if self._prefix == PATH:
            self._same("fields of a status", reply.keys(), {"status", "backends"})
            (server,) = reply["backends"]
            self._same("state", server["status"], reply["status"])
            del server["port"]
        self._same("fields of a server", server.keys(), {"status", "config", "stats"})
        theirs = self._upstream.status()
        self._same("status", {name: server[name] for name in theirs}, theirs)
        self._same("stats", server["stats"] is None, theirs["config"] is None)

    def _config(self) -> dict[str, Any]:
        shared = self._shared()
        del shared["params"]
        return shared | {"group_id": 0, "n_groups": 1, "seq_len": 4, "k_dim": 12}

    def _begin(self) -> None:
        body = self._shared()
        status = self._upstream.begin(body, self._config())
        reply = self._post("/init/generate", body, status)
        if status == 200:
            node = {"status", "backends", "n_groups", "results", "errors"}
            fields = node if self._prefix == PATH else {"status", "pow_status"}
            self._same("fields of begin", reply.keys(), fields)

    def _begin_again_elsewhere(self) -> None:
        """The broker starts anew, and may number its nodes in another order."""
        if self._upstream.round is None:
            count = self._chance.choice((1, 2, 8))
            self._share = {"node_id": self._chance.randint(1, count), "node_count": count}
        self._begin()

    def _run(self) -> None:
        """Let a round compute: its nonces are of its share, and none comes twice."""
        if self._upstream.round is None:
            return
        progress = self._service.controller.progress
        before = progress.checked
        until(lambda: self._service.controller.progress.checked > before, PATIENCE, pause=0.005)
        stored = self._service.controller.progress.stored
        latest = self._service.controller.rounds.recent_valid(stored.id)
        last = latest[-1][0]
        residue = (last - self._share["node_id"]) % self._share["node_count"]
        self._same("residue of a nonce", residue, 0)

    def _nonces(self) -> list[int]:
        """Return nonces in any order, of which some may stand twice."""
        return self._chance.choices(NONCES, k=self._chance.randint(1, 8))

    def _compute(self, nonces: list[int]) -> None:
        body = self._shared() | {"nonces": nonces, "wait": True}
        reply = self._post("/generate", body, 200)
        self._same("fields of a result", reply.keys(), COMPUTED)
        made = {artifact["nonce"]: artifact["vector_b64"] for artifact in reply["artifacts"]}
        self._same("nonces", [artifact["nonce"] for artifact in reply["artifacts"]], nonces)
        self._vectors |= made

    def _claim(self) -> tuple[dict[str, Any], set[int], list[int]]:
        """Return a validation of nonces whose vectors are known, and which are wrong."""
        nonces = self._chance.choices(sorted(self._vectors), k=self._chance.randint(1, 6))
        wrong = {nonce for nonce in set(nonces) if self._chance.random() < 0.2}
        artifacts = [
            {"nonce": nonce, "vector_b64": WRONG if nonce in wrong else self._vectors[nonce]}
            for nonce in sorted(set(nonces), key=lambda _: self._chance.random())
        ]
        # A validation has the number of the machine that checks.
        own = {"node_id": self._chance.randint(1, 3), "node_count": 3}
        body = self._shared() | own | {"nonces": nonces, "validation": {"artifacts": artifacts}}
        return body | {"stat_test": LEVELS}, wrong, nonces

    def _queue(self) -> None:
        claims = self._chance.random() < 0.5
        body = self._claim()[0] if claims else self._shared() | {"nonces": self._nonces()}
        reply = self._post("/generate", body, 200)
        self._same("fields of a job", reply.keys(), RESULT | {"queued_count"})
        counted = (reply["status"], reply["queued_count"])
        self._same("job", counted, ("queued", len(body["nonces"])))
        self._upstream.jobs[reply["request_id"]] = {"checked": claims}

    def _ask(self) -> None:
        """Wait for a result. The client never does so while a round generates."""
        if self._upstream.round is not None:
            return
        if self._chance.random() < 0.5:
            self._compute(self._nonces())
            return
        body, wrong, nonces = self._claim()
        reply = self._post("/generate", body | {"wait": True}, 200)
        self._same("fields of a verdict", reply.keys() - LISTED, CHECKED)
        mismatched = [nonce for nonce in nonces if nonce in wrong]
        counts = (reply["n_total"], reply["n_mismatch"], reply["mismatch_nonces"])
        self._same("counts", counts, (len(nonces), len(mismatched), mismatched))
        self._same("verdict", reply["fraud_detected"], reply["p_value"] < 0.05)

    def _poll(self) -> None:
        for job, asked in self._upstream.jobs.items():
            if self._upstream.round is None:
                until(lambda job=job: self._job(job)["status"] == "completed", PATIENCE)
                fields = CHECKED if asked["checked"] else COMPUTED
                self._same("fields of a job's end", self._job(job).keys() - LISTED, fields)
            else:
                known = self._job(job)["status"] in ("queued", "running", "completed")
                self._same("a known job", known, True)

    def _job(self, job: str) -> dict[str, Any]:
        answer = self._client.get(f"{self._prefix}/generate/{job}")
        self._same("status code of a job", answer.status_code, 200)
        return answer.json()

    def _stop(self) -> None:
        reply = self._post("/stop", {}, 200)
        node = {"status", "results", "errors"}
        fields = node if self._prefix == PATH else {"status", "pow_status"}
        self._same("fields of stop", reply.keys(), fields)
        self._upstream.stop()

    def _restart(self) -> None:
        """After a restart nothing generates, and what a client asked for is unknown upstream."""
        self._service.restart()
        self._upstream.stop()

    def _other_model(self) -> None:
        other = {"params": {"model": "another/model", "seq_len": 4}}
        path, nonces = self._chance.choice((("/init/generate", {}), ("/generate", {"nonces": [1]})))
        self._post(path, self._shared() | other | nonces, 409)

    def _other_artifacts(self) -> None:
        body, _, nonces = self._claim()
        self._post("/generate", body | {"nonces": [*nonces, 1000]}, 400)

    def _malformed(self) -> None:
        body = self._shared() | {"nonces": [1]}
        del body[self._chance.choice(sorted(body.keys() - {"nonces"}))]
        self._post("/generate", body, 422)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("first", "walks"),
    [(FIRST, min(FEW, WALKS)), pytest.param(FIRST + FEW, WALKS - FEW, marks=pytest.mark.slow)],
    ids=["few", "many"],
)
def test_no_sequence_of_calls_is_answered_otherwise_than_upstream(serving, first, walks):  # noqa: F811
    with serving(compatibility="gonka", job_ttl=3600, wait=PATIENCE) as service:
        service.rig.pause = 0.005  # a round that runs free would take the time of all calls
        for seed in range(first, first + walks):
            Walk(service, seed).run()


def test_what_a_stop_and_a_restart_leave_is_as_the_page_lists_it(serving):  # noqa: F811
    with serving(compatibility="gonka") as service:
        begun = service.client.post(f"{PUBLISHED}/init/generate", json=SHARED)
        assert begun.status_code == 200
        queued = service.post("/generate", SHARED | {"nonces": [1, 2]})
        service.restart()
        assert service.status() == {"status": "IDLE", "config": None, "stats": None}
        until(lambda: service.client.get(job(queued)).json()["status"] == "completed")
        service.client.post(f"{PUBLISHED}/init/generate", json=SHARED)
        waiting = service.post("/generate", SHARED | {"nonces": [1, 2]})
        service.post("/stop")
        assert service.client.get(job(waiting)).json()["status"] == "cancelled"
        assert service.client.get(job(queued)).json()["status"] == "completed"


def job(queued: dict[str, Any]) -> str:
    return f"{PUBLISHED}/generate/{queued['request_id']}"
