"""What two processes do together, as a program: started twice by test_parallel.py, as torchrun would start them.

First both run the command line, then the scenes. The first process prints what came of them as one JSON object.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace

from torch.distributed.device_mesh import init_device_mesh

from assay.cli import run
from assay.errors import AssayError, ModelError
from assay.models import Model, load_model
from assay.poc import Proof, Round, prove
from assay.poc.engines.hf.parallel import ParallelEngine, World, joined

ROUND = Round(block_hash="block_alpha", public_key="node_A", seq_len=16, model="small")


class Failing(ParallelEngine):
    """An engine whose second process fails at its second batch."""

    at = 2
    calls = 0

    def _run(self, inputs_btd, weights_bt):
        if self._world.rank == 1:
            Failing.calls += 1
            if Failing.calls == self.at:
                self.fail()
        return super()._run(inputs_btd, weights_bt)

    def fail(self) -> None:
        """Fail so that the others can be told."""
        raise ModelError("the second device does not run", wanted="one that does", do="see its own messages")


class FailingAtTheEnd(Failing):
    """An engine whose second process fails at its last batch, the third of three."""

    at = 3


class Dying(Failing):
    """An engine whose second process is killed at its second batch."""

    def fail(self) -> None:
        """Leave without a word."""
        os.kill(os.getpid(), signal.SIGKILL)


def proved(kind: type[ParallelEngine], model: Model, world: World, preset: str = "poc-2.0") -> Proof | str | None:
    """Prove 44 nonces together; the lead returns the proof, or the words of the error."""
    Failing.calls = 0
    try:
        with kind(model, world, batch_size=8, seq_len=16) as engine:
            if world.leads:
                return prove(model, replace(ROUND, preset=preset), range(44), engine=engine)
            engine.work()
    except AssayError as error:
        return f"{type(error).__name__}: {error.seen}"
    return None


def outcome(result: Proof | str | None) -> object:
    """Return what the test compares."""
    if not isinstance(result, Proof):
        return result
    values = [r.distance if r.vector is None else r.vector.tobytes().hex() for r in result.records]
    library = result.header.fingerprint.as_dict()["library"]
    return {"values": values, "library": library, "digest": result.header.digest}


def main(checkpoint: str, output: str, other_port: str) -> None:
    """Run the command line, then play the scenes in order; the last one ends the second process."""
    round = ("--block-hash", "block_alpha", "--public-key", "node_A", "--nonces", "0:44")
    shape = ("--seq-len", "16", "--batch-size", "8", "--device", "cpu", "--dtype", "float32")
    code = run(["poc", "prove", "--model", checkpoint, *round, *shape, "-o", output])
    os.environ["MASTER_PORT"] = other_port  # the store of the command line may still hold the first one
    with joined(device="cpu") as world:
        scenes = {name: outcome(scene) for name, scene in played(checkpoint, world)}
        if world.leads:
            print(json.dumps({"command line": code, **scenes}), flush=True)
            os._exit(0)  # there is no second process to say goodbye to


def played(checkpoint: str, world: World) -> Iterator[tuple[str, Proof | str | None]]:
    """Play every scene."""
    model = load_model(checkpoint, dtype="float32", device="cpu")
    yield "plain", proved(ParallelEngine, model, world)
    yield "hardened", proved(ParallelEngine, model, world, "hardened")
    yield "failing", proved(Failing, model, world)
    yield "failing at the end", proved(FailingAtTheEnd, model, world)
    yield "after the failure", proved(ParallelEngine, model, world)
    spread = replace(world, tensor_parallel=2, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",)))
    part = load_model(checkpoint, dtype="float32", device="cpu", mesh=spread.mesh)
    yield "spread", proved(ParallelEngine, part, spread)
    drawn = {"weights": "random-all", "block_hash": "b", "dtype": "float32", "device": "cpu"}
    part = load_model(checkpoint, mesh=spread.mesh, **drawn)
    yield "spread, random", proved(ParallelEngine, part, spread, "artifact")
    yield "dying", proved(Dying, model, world)


if __name__ == "__main__":
    main(*sys.argv[1:])
