"""The calls of a round into vLLM's workers, one by one: how many nonces each has, how long it takes, what lies between.

An engine proves the same number of nonces some times over by assay's own decoder. For each call the file has the
nonces, the nonces of a pass, the seconds in the worker, the seconds in which the host queued its kernels, and the
seconds since the reply to the call before. A first pass of its size is slow, because kernels are chosen for it.

    . .vllm/setup.sh; export PYTHONPATH=$PWD/src:$PYTHONPATH
    cd benchmarks; python3 vllm_direct_calls.py -o $OUT/vllm_direct_calls.json

A run that shows on a CPU that everything works:

    python vllm_direct_calls.py --model reference:qwen3 --device cpu --dtype float32 --seq-len 32 --nonces 20 60 60 \
        --batched-tokens 256 -o /tmp/calls.json
"""

import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from _common import note, parser, publish

from assay import poc
from assay.models import save_random
from assay.poc.engines.vllm import VLLMEngine, WorkerExtension, _engine

FILE = "ASSAY_BENCHMARK_CALLS"
"""Variable of the environment that names the file to which a worker writes its calls."""

if not torch.cuda.is_available():  # there the workers must keep their weights
    import _unpacked  # noqa: F401


class Timed(WorkerExtension):
    """The extension of assay, which writes down the calls."""

    assay_replied = 0.0

    def assay_pass(self, call, key, shares, batch, wait):
        """Take the time of a call."""
        began = time.perf_counter()
        replies = super().assay_pass(call, key, shares, batch, wait)
        row = {"nonces": len(shares[0]), "pass": batch, "since_last": began - self.assay_replied}
        row |= {"seconds": time.perf_counter() - began, "queued": self.assay_queued}
        row["errors"] = [reply["error"] for reply in replies if "error" in reply]
        with Path(os.environ[FILE]).open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.assay_replied = time.perf_counter()
        return replies

    def assay_begin(self, *arguments):
        """Take the time in which a call is queued."""
        began = time.perf_counter()
        begun = super().assay_begin(*arguments)
        self.assay_queued = time.perf_counter() - began
        return begun


def main():
    made = parser(__doc__)
    made.add_argument("--model", default="shape:qwen3-0.6b")
    made.add_argument("--device", default="cuda")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--seq-len", type=int, default=256)
    made.add_argument("--batched-tokens", type=int, default=16384, help="of a step of vLLM")
    made.add_argument("--wait", type=float, default=0.1, help="seconds that chat may wait, as ASSAY_VLLM_WAIT")
    made.add_argument("--nonces", type=int, nargs="+", default=[600, 2000, 2000, 4000], help="of each round")
    arguments = made.parse_args()
    _engine.EXTENSION = "vllm_direct_calls.Timed"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    options = {"enforce_eager": True, "max_model_len": arguments.seq_len + 64, "scheduling_policy": "priority"}
    options |= {"gpu_memory_utilization": 0.5} if arguments.device == "cuda" else {"max_num_seqs": 16}
    shape = {"batch_size": 128, "seq_len": arguments.seq_len, "dtype": arguments.dtype}
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        calls = Path(folder) / "calls.jsonl"
        os.environ[FILE] = str(calls)
        random = {"weights": "random-all", "block_hash": "bench", "dtype": arguments.dtype}
        checkpoint = str(save_random(arguments.model, Path(folder) / "model", **random))
        options |= {"max_num_batched_tokens": arguments.batched_tokens, "forward": "assay"}
        with VLLMEngine(checkpoint, **shape, **options) as engine:
            throttle = engine._client.throttle
            throttle.settings = replace(throttle.settings, wait=arguments.wait, in_flight=0)
            for count in arguments.nonces:
                calls.write_text("")
                round = poc.Round(block_hash=f"{time.time_ns()}", public_key="k", seq_len=engine.seq_len, model="m")
                began = time.perf_counter()
                poc.prove(engine.model, round, range(count), engine=engine)
                seconds = time.perf_counter() - began
                rows = [json.loads(line) for line in calls.read_text().splitlines()]
                rounds.append({"nonces": count, "seconds": seconds, "per_second": count / seconds, "calls": rows})
                note(f"{count} nonces in {len(rows)} calls, {count / seconds:.0f} a second")
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    publish("vllm_direct_calls", {"settings": settings, "rounds": rounds}, arguments.output)


if __name__ == "__main__":
    main()
