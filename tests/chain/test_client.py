"""The chain's state machine against services on a small model, over HTTP, with restarts."""

import random
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from assay.poc import Round
from assay.poc.net.deployment import Deployment
from assay.poc.protocol.records import encode_vector
from assay.poc.prover import prove
from tests.chain.client import Failed, Node, Stage, Validator, callback_url, start
from tests.chain.mlnode import MLNode
from tests.chain.services import Machine, Participant
from tests.usual import usual
from tests.waiting import until

SEQ_LEN = 4
OWN = "02own"
MACHINES = usual([(1, False), (2, False), (8, False), (1, True), (2, True)], (1, True))
"""Machines of an operator, and whether they are servers of one MLNode."""


class Host:
    """Machines of one operator, each called directly, or all as servers of one MLNode."""

    def __init__(self, folder: Path, model: object, count: int, *, behind: bool) -> None:
        self._held = ExitStack()
        settings = {"max_positions": 4096, "compatibility": "gonka" if behind else None}
        self.machines = [
            Machine(folder / str(i), Deployment.of(model, compiled=False), **settings)
            for i in range(count)
        ]
        self.nodes: list[Node] = []
        if behind:
            self._proxy = self._held.enter_context(MLNode([m.port for m in self.machines]))
            self.nodes.append(Node(self._proxy.url, 1))
        else:
            self.nodes += [Node(m.url, i) for i, m in enumerate(self.machines, 1)]

    def restart(self, place: int) -> None:
        """Restart a machine, which then listens on another port."""
        machine = self.machines[place]
        machine.end()
        machine.start()
        if len(self.nodes) == len(self.machines) and not hasattr(self, "_proxy"):
            self.nodes[place].url = machine.url
        else:
            self._proxy.ports[place] = machine.port

    def close(self) -> None:
        """End everything."""
        self._held.close()
        for machine in self.machines:
            machine.end()


@pytest.fixture(params=MACHINES, ids=str)
def host(request, tmp_path, small_model):
    count, behind = request.param
    made = Host(tmp_path, small_model, count, behind=behind)
    yield made
    made.close()


def made_by(model, key: str, stage: Stage, nonces: list[int]) -> list[dict]:
    """Return a participant's artifacts."""
    round = Round(
        block_hash=stage.block_hash, public_key=key, preset="artifact", seq_len=stage.seq_len
    )
    records = prove(model, round, sorted(nonces), batch_size=4).records
    return [{"nonce": r.nonce, "vector_b64": encode_vector(r.vector)} for r in records]


@pytest.mark.slow
def test_rounds_of_the_chain_with_restarts_between(host, small_model):
    chance = random.Random(0)
    count = len(host.nodes)
    with Participant() as receiver:
        for height in (10, 20, 30):
            model = small_model.reference
            stage = Stage(f"block {height}", height, model, SEQ_LEN, receiver.url)
            for node in host.nodes:
                assert node.status() == "IDLE"
                assert start(node, stage, OWN, count)
                assert node.status() == "GENERATING"
                assert not start(node, stage, OWN, count)  # as when the broker asks again

            def computed(node: Node, stage: Stage = stage) -> int:
                return len(receiver.artifacts[stage.block_hash, node.number])

            until(lambda: all(computed(node) >= 3 for node in host.nodes), 60)
            # A machine that restarts is IDLE, and the broker begins the same round again.
            place = chance.randrange(len(host.machines))
            host.restart(place)
            node = host.nodes[place if count > 1 else 0]
            if len(host.machines) == count:
                assert node.status() == "IDLE"
                assert start(node, stage, OWN, count)
                before = computed(node)
                until(lambda: computed(node) > before, 60)  # noqa: B023
            else:
                assert node.status() == "MIXED"
            receiver.delay = 0.3
            if height == 20:  # no stop comes between these two
                host.restart(place)
            check_votes(host, receiver, stage, small_model)
            receiver.delay = 0.0
            for one in host.nodes:
                share = sorted(receiver.artifacts[stage.block_hash, one.number])
                assert {nonce % count for nonce in share} == {one.number % count}
                assert share[0] == one.number
    escaped = callback_url("", small_model.reference)
    assert receiver.paths == {f"{escaped}/generated", f"{escaped}/validated"}


def check_votes(host: Host, receiver: Participant, stage: Stage, model) -> None:
    """Check two participants while a machine restarts: the honest one is not reported."""
    waiting = threading.Event()
    validator = Validator(host.nodes, stage, lambda: waiting.wait(0.2))
    validator.begin()
    until(lambda: {node.status() for node in host.nodes} == {"IDLE"})
    honest = made_by(model, "02honest", stage, [5, 2, 11, 40, 3, 7])
    wrong = np.ones(12, np.float16) / np.float16(12**0.5)
    cheat = [one | {"vector_b64": encode_vector(wrong)} for one in honest]
    restart = threading.Thread(target=host.restart, args=(len(host.machines) - 1,))
    receiver.verdicts.clear()
    restart.start()
    for key, artifacts in (("02honest", honest), ("02cheat", cheat)):
        assert validator.check(key, artifacts)
    restart.join()
    until(lambda: len(receiver.verdicts) >= 2, 60)
    weights = {verdict["public_key"]: validator.vote(verdict) for verdict in receiver.verdicts}
    assert weights == {"02honest": 6, "02cheat": -1}
    assert validator.reported == ["02cheat"]


def test_an_engine_of_another_model_takes_no_work(tmp_path, small_model):
    machine = Machine(tmp_path, Deployment.of(small_model, compiled=False), max_positions=4096)
    try:
        node = Node(machine.url, 1)
        stage = Stage("block", 1, "another/model", SEQ_LEN, "http://127.0.0.1:9")
        with pytest.raises(Failed) as refused:
            start(node, stage, OWN, 1)
        assert refused.value.status == 409
        validator = Validator([node], stage, lambda: None)
        assert not validator.check("02honest", [{"nonce": 1, "vector_b64": ""}])
        assert validator.reported == ["02honest"]
        assert len([path for path, _ in node.calls if path == "/generate"]) == 25
    finally:
        machine.end()
