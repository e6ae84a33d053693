"""The whole API as a state machine: random calls, restarts and calls at the same time against a
model of it.
"""

import tempfile
import threading
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from assay.poc.service import ServiceSettings, State
from assay.poc.service.states import NEEDS_ROUND, TRANSITIONS
from tests.poc.service.conftest import ARTIFACTS, BLOCK, PREFIX, ROUND, Rig, Service
from tests.usual import examples
from tests.waiting import until

BLOCKS = st.sampled_from(["block_a", "block_b", "block_c"])
KINDS = st.sampled_from(["init", "init/generate", "init/validate"])
CALLS = st.sampled_from(["phase/generate", "phase/validate", "stop"])


class ServiceMachine(RuleBasedStateMachine):
    """Keeps what the service should be, and asks it after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()
        self.rig.pause = 0.0005
        self.directory = tempfile.TemporaryDirectory()
        self.service = Service(
            self.rig,
            ServiceSettings(
                data_dir=Path(self.directory.name), seq_len=4, max_queued_nonces=64, job_ttl=600
            ),
        )
        self.service.wait_ready()
        self.state = State.IDLE
        self.block = ""
        self.checked: dict[str, int] = {}
        self.jobs: dict[str, int] = {}

    def teardown(self) -> None:
        self.service.close()
        self.directory.cleanup()

    def expect(self, call: str, answer) -> bool:
        """Compare an answer with the table, take the state it leads to, and say whether the call
        was allowed.
        """
        wanted = TRANSITIONS[call].get(self.state)
        if wanted is None or (call in NEEDS_ROUND and not self.block):
            assert answer.status_code == 409, (call, self.state, answer.text)
            return False
        assert answer.status_code == 200, (call, self.state, answer.text)
        self.state = wanted
        return True

    @rule(call=KINDS, block=BLOCKS)
    def init(self, call, block):
        if self.expect(
            call, self.service.client.post(f"{PREFIX}/{call}", json=ROUND | {"block_hash": block})
        ):
            self.block = block

    @rule(block=BLOCKS)
    def init_with_other_values(self, block):
        """A round continues with the values it began with, or not at all."""
        if block in self.checked:
            other = ROUND | {"block_hash": block, "r_target": 1.3}
            assert self.service.client.post(f"{PREFIX}/init", json=other).status_code == 409

    @rule(call=CALLS)
    def change(self, call):
        self.expect(call, self.service.client.post(f"{PREFIX}/{call}"))

    @rule(block=BLOCKS, nonces=st.lists(st.integers(0, 50), max_size=6, unique=True))
    def validate(self, block, nonces):
        body = BLOCK | {
            "block_hash": block,
            "nonces": nonces,
            "dist": [1.4] * len(nonces),
            "node_id": 0,
        }
        answer = self.service.client.post(f"{PREFIX}/validate", json=body)
        if self.state is State.VALIDATING and block == self.block:
            assert answer.status_code == 200, answer.text
            assert len(answer.json()["computed_distances"]) == len(nonces)
        else:
            assert answer.status_code == 409

    @rule(nonces=st.lists(st.integers(0, 100), min_size=1, max_size=20, unique=True))
    def submit(self, nonces):
        answer = self.service.client.post(f"{PREFIX}/generate", json=ARTIFACTS | {"nonces": nonces})
        assert answer.status_code in (200, 429)
        if answer.status_code == 200:
            self.jobs[answer.json()["request_id"]] = len(nonces)

    @rule(
        calls=st.lists(
            st.sampled_from(["init/generate", "init/validate", "phase/validate", "stop"]),
            min_size=2,
        )
    )
    def at_the_same_time(self, calls):
        answers = []

        def call(path: str) -> None:
            answers.append(
                self.service.client.post(f"{PREFIX}/{path}", json=ROUND | {"block_hash": "block_a"})
            )

        threads = [threading.Thread(target=call, args=(path,)) for path in calls[:5]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} <= {200, 409}
        # Whatever the order was, the service is in one of the states that it allows.
        status = self.service.status()
        self.state = State(status["state"])
        self.block = status["config"]["block_hash"] if status["config"] else ""

    @rule()
    def restart(self):
        self.service.restart()

    @rule()
    def let_it_generate(self):
        if self.state is State.GENERATING:
            before = self.service.checked()
            until(lambda: self.service.checked() > before)

    @rule()
    def let_jobs_finish(self):
        if self.state is not State.GENERATING:
            for job, count in self.jobs.items():
                until(lambda job=job: self._job(job)["status"] == "completed")
                assert len(self._job(job)["artifacts"]) == count

    def _job(self, job: str):
        return self.service.client.get(f"{PREFIX}/generate/{job}").json()

    @invariant()
    def the_state_is_the_models(self):
        status = self.service.status()
        assert status["state"] == self.state == status["status"]
        assert (status["config"] or {"block_hash": ""})["block_hash"] == self.block
        assert status["error"] is None

    @invariant()
    def nothing_that_was_counted_is_lost(self):
        if self.block:
            checked = self.service.checked()
            assert checked >= self.checked.get(self.block, 0)
            self.checked[self.block] = checked


TestService = ServiceMachine.TestCase
TestService.settings = settings(
    max_examples=examples(30),
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
