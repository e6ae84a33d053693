"""The votes of a chain's validator that has assay as its engine: honest and cheating participants.

A validator with two nodes, one called directly and one through a stand-in of MLNode before two
servers, runs the state machine of the Gonka chain's client over HTTP: begins each round on its own
nodes, stops them, sends a sample of every participant to its nodes in turn (25 tries), takes the
verdicts as callbacks, and reports a participant whose verdict is fraud or whose tries are used up.
It recomputes in float32. Of the honest participants half compute in bfloat16 and half in float16;
cheats serve weights that are rounded to four bits. The rule is the chain's own, with its default
parameters. In each round one server restarts while validations are sent, and receivers are slow in
every fourth. All of it on a bundled model, which we trained ourselves.

Pass: no honest participant is reported in any round, and every cheat is reported, each in at least
95 of 100 rounds.

    python research/benchmarks/chain_votes.py -o research/results/chain_votes.json
"""

import random
import threading
import time
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from _common import note, parser, publish
from scipy.stats import beta

from assay.models import load_model
from assay.poc import Round
from assay.poc.cheats import rounded
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.net.deployment import Deployment
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.records import encode_vector
from assay.poc.prover import compute
from tests.chain.client import LEVELS, Node, Stage, Validator, start
from tests.chain.mlnode import MLNode
from tests.chain.services import Machine, Participant

MODEL = "reference:qwen3"
SEQ_LEN = 8
BATCH = 32
OWN = "02own"
PATIENCE = 600.0  # seconds in which all verdicts of a round must come


class Prover:
    """Participants that compute with one engine."""

    def __init__(self, model):
        self._engine = HFEngine(model, batch_size=BATCH, seq_len=SEQ_LEN, compiled=False)

    def artifacts(self, key, block, nonces):
        """Return the artifacts of nonces in the form of the chain."""
        round = Round(block_hash=block, public_key=key, preset="artifact", seq_len=SEQ_LEN)
        batches = compute(self._engine, get_pipeline("artifact"), round.inputs(nonces), None)
        return [
            {"nonce": record.nonce, "vector_b64": encode_vector(record.vector)}
            for record in chain.from_iterable(batches)
        ]


class Network:
    """The validator's machines, and who takes their callbacks."""

    def __init__(self, folder, model):
        self.receiver = Participant()
        self.machines = [
            Machine(folder / name, Deployment.of(model, compiled=False), compatibility=setting)
            for name, setting in (("direct", None), ("first", "gonka"), ("second", "gonka"))
        ]
        self.node = MLNode([machine.port for machine in self.machines[1:]])
        self.nodes = [Node(self.machines[0].url, 1), Node(self.node.url, 2)]

    def restart(self, place):
        """End a server and start it again, on another port."""
        machine = self.machines[place]
        machine.end()
        machine.start()
        if place == 0:
            self.nodes[0].url = machine.url
        else:
            self.node.ports[place - 1] = machine.port

    def close(self):
        """End everything."""
        self.node.close()
        for machine in self.machines:
            machine.end()
        self.receiver.close()


def wait_for(true, what):
    """Wait until something holds."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come in {PATIENCE:.0f} s")
        time.sleep(0.05)


def run_round(network, number, groups, chance, sample):
    """Run one round; return the keys that were reported, the verdicts, and the restarts."""
    stage = Stage(f"block {number}", number, MODEL, SEQ_LEN, network.receiver.url)
    begun = [start(node, stage, OWN, 2) for node in network.nodes]
    assert all(begun), "a round was skipped because an old one was generating"
    wait_for(
        lambda: all(network.receiver.artifacts[stage.block_hash, i] for i in (1, 2)),
        "the first nonces",
    )
    pause = threading.Event()
    validator = Validator(network.nodes, stage, lambda: pause.wait(0.3))
    validator.begin()
    network.receiver.verdicts.clear()
    network.receiver.delay = 0.2 if number % 4 == 0 else 0.0
    work = []
    for prover, keys in groups:
        for key in keys:
            nonces = sorted(chance.sample(range(1, 100_000), sample))
            work.append((key, prover.artifacts(key, stage.block_hash, nonces)))
    chance.shuffle(work)
    place = chance.randrange(len(network.machines))
    restart = threading.Thread(target=network.restart, args=(place,))
    when = chance.randrange(len(work))
    for i, (key, artifacts) in enumerate(work):
        if i == when:
            restart.start()
        validator.check(key, artifacts)
    restart.join()
    wait_for(lambda: len(network.receiver.verdicts) >= len(work), "the verdicts")
    for verdict in network.receiver.verdicts:
        validator.vote(verdict)
    return validator.reported, list(network.receiver.verdicts)


def main():
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=100)
    options.add_argument("--honest", type=int, default=50)
    options.add_argument("--cheats", type=int, default=10)
    options.add_argument("--sample", type=int, default=32)
    chosen = options.parse_args()
    honest = [f"02honest{i}" for i in range(chosen.honest)]
    cheats = [f"02cheat{i}" for i in range(chosen.cheats)]
    model = load_model(MODEL, dtype="float32")
    groups = [
        (Prover(load_model(MODEL, dtype="bfloat16")), honest[::2]),
        (Prover(load_model(MODEL, dtype="float16")), honest[1::2]),
        (Prover(rounded(load_model(MODEL, dtype="float32"), 4)), cheats),
    ]
    chance = random.Random(0)
    reports = dict.fromkeys(honest + cheats, 0)
    mismatches = {"honest": 0, "cheats": 0}
    with TemporaryDirectory() as folder:
        network = Network(Path(folder), model)
        try:
            for number in range(1, chosen.rounds + 1):
                reported, verdicts = run_round(network, number, groups, chance, chosen.sample)
                for key in reported:
                    reports[key] += 1
                for verdict in verdicts:
                    kind = "cheats" if verdict["public_key"] in cheats else "honest"
                    mismatches[kind] += verdict["n_mismatch"]
                accused = sum(reports[key] for key in honest)
                note(f"round {number}: {len(reported)} reported, {accused} honest ones so far")
        finally:
            network.close()
    votes = chosen.rounds * chosen.honest
    accused = sum(reports[key] for key in honest)
    caught = [reports[key] / chosen.rounds for key in cheats]
    figures = {
        "model": MODEL,
        "trained_by_us": True,
        "seq_len": SEQ_LEN,
        "rounds": chosen.rounds,
        "sample": chosen.sample,
        "stat_test": LEVELS,
        "restarts": chosen.rounds,
        "honest": {
            "participants": chosen.honest,
            "votes": votes,
            "reported": accused,
            "upper_95": float(beta.ppf(0.95, accused + 1, votes - accused)),
            "mismatches": mismatches["honest"],
            "nonces": votes * chosen.sample,
        },
        "cheats": {
            "participants": chosen.cheats,
            "reported_rounds_least": min(caught),
            "reported_rounds_mean": sum(caught) / len(caught),
            "mismatches": mismatches["cheats"],
            "nonces": chosen.rounds * chosen.cheats * chosen.sample,
        },
        "passed": accused == 0 and min(caught) >= 0.95,
    }
    publish("chain_votes", figures, chosen.output)


if __name__ == "__main__":
    main()
