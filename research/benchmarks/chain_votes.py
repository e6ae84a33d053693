"""The votes of a chain's validator that has assay as its engine: honest and cheating participants.

A validator with two nodes, one called directly and one through a stand-in of MLNode before two
servers, runs the state machine of the Gonka chain's client over HTTP: begins each round on its own
nodes, stops them, sends a sample of every participant to its nodes in turn (25 tries), takes the
verdicts as callbacks, and reports a participant whose verdict is fraud or whose tries are used up.
It recomputes in float32. Of the honest participants half compute in bfloat16 and half in float16;
cheats serve weights that are rounded to four bits. In each round one server restarts while
validations are sent, and receivers are slow in every fourth. All of it on a bundled model, which we
trained ourselves.

The rule is the chain's own. Its three parameters are those that ``calibrate --export gonka`` writes
for an audit of so many nonces, from a calibration of the model on this machine that is measured
first: on other blocks, with honest formats alone. Its level is such that one honest vote or more of
the whole run is wrong with a chance of at most 5 %. What the fallback of the chain's client (0.4,
0.1, 0.05) would have said of the cheats is counted beside it, on the same vectors.

Nonces of participants with one engine share its batches. Pass: no honest participant is reported in
any round, and every cheat is reported in every round.

    python research/benchmarks/chain_votes.py -o research/results/chain_votes.json
"""

import random
import threading
import time
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from _common import note, parser, publish, round_to
from scipy.stats import beta

from assay.models import load_model
from assay.poc import Round, calibrate_model
from assay.poc.cheats import rounded
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.net.deployment import Deployment
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.records import encode_vector
from assay.poc.prover import compute
from assay.poc.verdict.chain_rule import ChainRule, export_rule
from tests.chain.client import LEVELS, Node, Stage, Validator, start
from tests.chain.mlnode import MLNode
from tests.chain.services import Machine, Participant

MODEL = "reference:qwen3"
PRESET = get_pipeline("artifact")
SEQ_LEN = 4
BATCH = 128
OWN = "02own"
CHANCE = 0.05  # of a wrong vote against an honest participant in the whole run
PATIENCE = 900.0  # seconds in which all verdicts of a round must come


class Prover:
    """Participants that compute with one engine."""

    def __init__(self, model, keys):
        self.keys = keys
        self._engine = HFEngine(model, batch_size=BATCH, seq_len=SEQ_LEN, compiled=False)

    def vectors(self, block, nonces):
        """Return the vectors of the nonces of each key, in batches that several keys share."""
        inputs = []
        for key, drawn in nonces.items():
            round = Round(block_hash=block, public_key=key, preset="artifact", seq_len=SEQ_LEN)
            inputs += round.inputs(drawn)
        records = chain.from_iterable(compute(self._engine, PRESET, inputs, None))
        return {
            key: [next(records).vector.astype(np.float16) for _ in drawn]
            for key, drawn in nonces.items()
        }


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


class Votes:
    """Who was reported, how often, and what the vectors would have been called by other numbers."""

    def __init__(self, honest, cheats, sample):
        self.reports = dict.fromkeys([*honest, *cheats], 0)
        self.honest = honest
        self.cheats = cheats
        self.mismatches = {"honest": 0, "cheats": 0}
        self.missed_by_fallback = 0
        self._sample = sample
        self._fallback = ChainRule(**LEVELS)

    def add(self, reported, verdicts):
        """Count the reports and verdicts of a round."""
        for key in reported:
            self.reports[key] += 1
        for verdict in verdicts.values():
            kind = "cheats" if verdict["public_key"] in self.cheats else "honest"
            self.mismatches[kind] += verdict["n_mismatch"]

    def compare(self, claimed, recomputed):
        """Count the cheats of a round that the fallback of the client would have let pass."""
        fewest = self._fallback.fewest(self._sample)
        for key, vectors in claimed.items():
            apart = np.float32(vectors) - np.float32(recomputed[key])
            distances = np.linalg.norm(apart, axis=1)
            mismatches = int((distances > self._fallback.dist_threshold).sum())
            self.missed_by_fallback += mismatches < fewest

    def figures(self, rounds):
        """Return the shares, and whether they pass."""
        votes = rounds * len(self.honest)
        accused = sum(self.reports[key] for key in self.honest)
        caught = [self.reports[key] for key in self.cheats]
        cheating = rounds * len(self.cheats)
        return {
            "honest": {
                "participants": len(self.honest),
                "votes": votes,
                "reported": accused,
                "upper_95": float(beta.ppf(0.95, accused + 1, votes - accused)),
                "mismatches": self.mismatches["honest"],
                "nonces": votes * self._sample,
            },
            "cheats": {
                "participants": len(self.cheats),
                "votes": cheating,
                "reported": sum(caught),
                "lower_95": float(beta.ppf(0.05, sum(caught), cheating - sum(caught) + 1)),
                "mismatches": self.mismatches["cheats"],
                "nonces": cheating * self._sample,
                "missed_by_fallback": self.missed_by_fallback,
            },
            "passed": accused == 0 and min(caught) == rounds,
        }


def wait_for(true, what):
    """Wait until something holds."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come in {PATIENCE:.0f} s")
        time.sleep(0.02)


def run_round(network, stage, vectors, nonces, rule, chance):
    """Run one round; return the keys that were reported, and the verdicts by key."""
    begun = [start(node, stage, OWN, 2) for node in network.nodes]
    assert all(begun), "a round was skipped because an old one was generating"
    receiver = network.receiver
    wait_for(
        lambda: all(receiver.artifacts[stage.block_hash, node] for node in (1, 2)),
        "the first nonces",
    )
    pause = threading.Event()
    validator = Validator(network.nodes, stage, lambda: pause.wait(0.3), rule)
    validator.begin()
    receiver.verdicts.clear()
    receiver.delay = 0.2 if stage.height % 4 == 0 else 0.0
    place = chance.randrange(len(network.machines))
    restart = threading.Thread(target=network.restart, args=(place,))
    keys = chance.sample(sorted(vectors), len(vectors))
    restarts_at = chance.choice(keys)
    taken = set()
    for key in keys:
        if key == restarts_at:
            restart.start()
        artifacts = [
            {"nonce": nonce, "vector_b64": encode_vector(vector)}
            for nonce, vector in zip(nonces[key], vectors[key], strict=True)
        ]
        if validator.check(key, artifacts):
            taken.add(key)
    restart.join()

    def verdicts():
        return {verdict["public_key"]: verdict for verdict in list(receiver.verdicts)}

    wait_for(lambda: taken <= verdicts().keys(), "the verdicts")
    for verdict in verdicts().values():
        validator.vote(verdict)
    return validator.reported, verdicts()


def main():
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=100)
    options.add_argument("--honest", type=int, default=50)
    options.add_argument("--cheats", type=int, default=10)
    options.add_argument("--sample", type=int, default=32)
    chosen = options.parse_args()
    began = time.monotonic()
    measured = calibrate_model(MODEL, preset="artifact", seq_len=SEQ_LEN)
    level = round_to(CHANCE / (chosen.rounds * chosen.honest), 3)
    exported = export_rule(measured, checked=chosen.sample, alpha=level).as_dict()
    note(f"the rule: {exported['stat_test']}")
    honest = [f"02honest{i}" for i in range(chosen.honest)]
    cheats = [f"02cheat{i}" for i in range(chosen.cheats)]
    model = load_model(MODEL, dtype="float32")
    cheap = Prover(rounded(load_model(MODEL, dtype="float32"), 4), cheats)
    provers = (
        Prover(load_model(MODEL, dtype="bfloat16"), honest[::2]),
        Prover(load_model(MODEL, dtype="float16"), honest[1::2]),
        cheap,
    )
    own = Prover(model, [OWN])
    chance = random.Random(0)
    votes = Votes(honest, cheats, chosen.sample)
    with TemporaryDirectory() as folder:
        network = Network(Path(folder), model)
        try:
            for number in range(1, chosen.rounds + 1):
                stage = Stage(f"block {number}", number, MODEL, SEQ_LEN, network.receiver.url)
                vectors = {}
                nonces = {}
                for prover in provers:
                    drawn = {
                        key: sorted(chance.sample(range(1, 100_000), chosen.sample))
                        for key in prover.keys
                    }
                    nonces |= drawn
                    vectors |= prover.vectors(stage.block_hash, drawn)
                claimed = {key: vectors[key] for key in cheats}
                drawn = {key: nonces[key] for key in cheats}
                votes.compare(claimed, own.vectors(stage.block_hash, drawn))
                reported, verdicts = run_round(
                    network, stage, vectors, nonces, exported["stat_test"], chance
                )
                votes.add(reported, verdicts)
                accused = sorted(set(reported) & set(honest))
                minutes = (time.monotonic() - began) / 60
                note(f"{minutes:.1f} min, round {number}: {len(reported)} reported, {accused}")
        finally:
            network.close()
    figures = {
        "model": MODEL,
        "trained_by_us": True,
        "seq_len": SEQ_LEN,
        "rounds": chosen.rounds,
        "sample": chosen.sample,
        "restarts": chosen.rounds,
        "rule": exported,
        "fallback": LEVELS,
        **votes.figures(chosen.rounds),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    publish("chain_votes", figures, chosen.output)


if __name__ == "__main__":
    main()
