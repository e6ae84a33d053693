"""Nonces per second of vLLM's direct path, beside its request path, its own prefill, and compiled transformers.

One run per model on one GPU: (a) `prove` on compiled transformers; then one vLLM engine, on which in turns (b) vLLM's
own prefill of as many random prompts of that length, one token each and all at once, (c) nonces as requests, (d) nonces
in whole batches inside the workers. Then chat, ten requests a second: alone, alone again, and beside a round. Tokens
are compared with those of the first run alone. The engine of (b) to (d) has the settings of a server: chat first, a
quarter of the time, at most a tenth of a second of nonces at once.

    . .vllm/setup.sh; export PYTHONPATH=$PWD/src:$PYTHONPATH
    cd research/benchmarks; python3 vllm_direct.py -o $OUT/vllm_direct.json

A run that shows on a CPU that everything works:

    python vllm_direct.py --models reference:qwen3 --device cpu --dtype float32 --seq-len 32 \
        --batched-tokens 256 --batch-size 8 --seconds 1 --turns 1 --chat 6 --tokens 4
"""

import asyncio
import contextlib
import gc
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _common import note, parser, publish
from _vllm import answer

from assay import poc
from assay.models import load_model, save_random
from assay.poc import HFEngine
from assay.poc.engines.hf.engine import auto_batch
from assay.poc.engines.hf.fused import worth_compiling

PATHS = {"requests": "requests", "direct": "auto"}
SETTLING = 1.6  # seconds after which the calls of a round have their length
CHECKED = 64  # nonces whose values are compared


def round_of(block, seq_len, preset="poc-2.0"):
    """Return a round."""
    return poc.Round(block_hash=block, public_key="k", seq_len=seq_len, preset=preset, model="m")


def measured(work, seconds):
    """Return how many a second ``work(count)`` does, after a warm-up that also says how many fit into the time."""
    work(8)
    rate = 0.0
    for limit in (0.0, seconds / 4, seconds):
        count = max(8, int(rate * limit))
        started = time.perf_counter()
        work(count)
        rate = count / (time.perf_counter() - started)
    return rate


def prover(engine, model, folder):
    """Return a function that proves so many nonces of a new block, into a file."""

    def work(count):
        round = round_of(str(time.time_ns()), engine.seq_len)
        poc.prove(model, round, range(count), engine=engine, output=Path(folder) / "proof.jsonl", overwrite=True)

    return work


def values(engine, model):
    """Return what is published of the nonces that are compared, by preset."""
    found = {}
    for preset in ("poc-2.0", "hardened"):
        proof = poc.prove(model, round_of("compare", engine.seq_len, preset), range(CHECKED), engine=engine)
        found[preset] = np.array([r.distance if r.vector is None else r.vector for r in proof.records], np.float64)
    return found


def transformers(arguments, checkpoint, folder):
    """(a): return the figures of compiled transformers, and what it publishes of some nonces."""
    model = load_model(checkpoint, dtype=arguments.dtype, device=arguments.device)
    size = arguments.batch_size or auto_batch(model, arguments.seq_len)
    compiled = worth_compiling(model)
    engine = HFEngine(model, batch_size=size, seq_len=arguments.seq_len, compiled=compiled)
    rates = [measured(prover(engine, model, folder), arguments.seconds) for _ in range(arguments.turns)]
    return {"per_second": rates, "batch_size": size, "compiled": compiled}, values(engine, model)


def prompts_of(engine, count, length, seed):
    """Return so many random prompts."""
    return np.random.default_rng(seed).integers(10, engine.vocab_size, (count, length)).tolist()


def answers(engine, prompts, tokens, interval=0.0):
    """Send prompts to vLLM at fixed times, or all at once; return what each gave."""

    async def run():
        began = time.perf_counter()

        async def one(index):
            await asyncio.sleep(max(0.0, began + index * interval - time.perf_counter()))
            return await answer(engine, prompts[index], tokens)

        return await asyncio.gather(*(one(index) for index in range(len(prompts))))

    return asyncio.run_coroutine_threadsafe(run(), engine._client.loop).result()


def set_throttle(engine, **settings):
    """Change what the engine lets nonces take, or their path."""
    throttle = engine._client.throttle
    throttle.settings = replace(throttle.settings, **settings)


def rates_of(engine, arguments, folder):
    """(b) to (d): return the rates of all ways, measured in turns."""
    proving = prover(engine, engine.model, folder)
    works = {"own_prefill": lambda count: answers(engine, prompts_of(engine, count, engine.seq_len, None), 1)}
    works |= dict.fromkeys(PATHS, proving)
    rates = {name: [] for name in works}
    for turn in range(arguments.turns):
        for name in works if turn % 2 else reversed(works):
            if name in PATHS:
                set_throttle(engine, path=PATHS[name])
            rates[name].append(measured(works[name], arguments.seconds))
    return rates


def distance(one, other):
    """Return the median and the largest distance of two sets of values."""
    apart = np.abs(one - other)
    return [float(np.median(apart)), float(apart.max())]


@contextlib.contextmanager
def nonces_running(engine, counted):
    """Run a round in the background; ``counted`` gets the nonces that have run."""
    ended = threading.Event()

    def work():
        round, pipeline = round_of(str(time.time_ns()), engine.seq_len), poc.get_pipeline("poc-2.0")
        with contextlib.closing(engine.outputs(round, pipeline, range(2**40))) as batches:
            for batch in batches:
                counted.append(len(batch))
                if ended.is_set():
                    break

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while not counted:
            time.sleep(0.05)
        yield
    finally:
        ended.set()
        thread.join()


def chat(engine, arguments):
    """Return times to the first token [50th and 95th percentile, largest] alone and beside a round, and its rate."""
    prompts = [prompts_of(engine, 1, 64, index)[0] for index in range(arguments.chat)]
    counted = []

    def talk():
        return answers(engine, prompts, arguments.tokens, 0.1)

    def milliseconds(runs):
        return [round(1e3 * float(value), 2) for value in np.quantile([first for _, first in runs], [0.5, 0.95, 1.0])]

    def same(runs):
        return sum(one[0] == other[0] for one, other in zip(runs, alone, strict=True))

    alone, again = talk(), talk()
    with nonces_running(engine, counted):
        time.sleep(SETTLING)
        before, started = sum(counted), time.perf_counter()
        beside = talk()
        rate = (sum(counted) - before) / (time.perf_counter() - started)
    figures = {"requests": len(prompts), "alone_ms": milliseconds(alone + again), "beside_ms": milliseconds(beside)}
    figures["ratios"] = [b / a for a, b in zip(figures["alone_ms"], figures["beside_ms"], strict=True)]
    figures |= {"same_tokens_alone_again": same(again), "same_tokens_beside": same(beside)}
    return figures | {"nonces_per_second_meanwhile": rate}


def measure(arguments, checkpoint, folder):
    """Return the figures of one model on transformers and in an engine of vLLM."""
    from assay.poc.vllm.engine import VLLMEngine

    compiled, theirs = transformers(arguments, checkpoint, folder)
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
        options = {"gpu_memory_utilization": 0.5}
    else:
        options = {"enforce_eager": True}
    options |= {"max_model_len": arguments.seq_len + 256, "max_num_batched_tokens": arguments.batched_tokens}
    options |= {"batch_size": 128, "seq_len": arguments.seq_len, "dtype": arguments.dtype}
    with VLLMEngine(checkpoint, **options, scheduling_policy="priority") as engine:
        row = {"transformers": compiled, "fingerprint": engine.fingerprint.as_dict()}
        set_throttle(engine, wait=arguments.wait, in_flight=0)
        row["vllm"] = rates_of(engine, arguments, folder)
        taken = {"transformers": theirs}
        for path, setting in PATHS.items():  # the direct one last: chat is beside it
            set_throttle(engine, path=setting)
            taken[path] = values(engine, engine.model)
        row["direct"] = engine._client.direct.describe() | {"fingerprint": engine.fingerprint.as_dict()}
        rates = row["vllm"] | {"transformers": compiled["per_second"]}
        best = {name: statistics.median(seen) for name, seen in rates.items()}
        row["ratios"] = {
            f"direct_over_{name}": best["direct"] / rate for name, rate in best.items() if name != "direct"
        }
        row["residuals"] = {
            preset: {
                f"direct_from_{other}": distance(found, taken[other][preset]) for other in ("requests", "transformers")
            }
            for preset, found in taken["direct"].items()
        }
        if arguments.chat:
            row["chat_ten_a_second"] = chat(engine, arguments)
    return row


def main():
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", default=["shape:qwen3-0.6b", "shape:llama-3.2-1b"])
    made.add_argument("--device", default="cuda")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--seq-len", type=int, default=256)
    made.add_argument("--batched-tokens", type=int, default=16384, help="of a step of vLLM")
    made.add_argument("--batch-size", type=int, default=0, help="of transformers; 0 takes what prove takes by itself")
    made.add_argument("--wait", type=float, default=0.1, help="seconds that chat may wait, as ASSAY_VLLM_WAIT")
    made.add_argument("--seconds", type=float, default=3.0, help="of every timing")
    made.add_argument("--turns", type=int, default=2)
    made.add_argument("--chat", type=int, default=60, help="requests at ten a second; 0 leaves chat out")
    made.add_argument("--tokens", type=int, default=24, help="of a request")
    arguments = made.parse_args()
    figures = {"seq_len": arguments.seq_len, "batched_tokens": arguments.batched_tokens, "rows": []}
    figures |= {"dtype": arguments.dtype, "wait_seconds": arguments.wait}
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = model
            if ":" in model:  # a shape, or a bundled model, with random weights
                drawn = {"weights": "random-all", "block_hash": "bench", "dtype": arguments.dtype}
                checkpoint = str(save_random(model, Path(folder) / "model", **drawn))
            figures["rows"].append({"model": model, **measure(arguments, checkpoint, folder)})
        note(f"{model}: {figures['rows'][-1]}")
        publish("vllm_direct", figures, arguments.output)


if __name__ == "__main__":
    main()
