"""Nonces per second of vLLM's direct path, beside its request path, its own prefill, and compiled transformers.

One run per model on one GPU: (a) `prove` on compiled transformers; then one vLLM engine, on which in turns (b) vLLM's
own prefill of as many random prompts of that length, one token each and all at once, (c) nonces as requests, (d) nonces
in whole batches inside the workers. Then chat, ten requests a second: alone, alone again, and beside a round; and
single requests that find the engine busy with nonces after a pause, alone and beside a round. Tokens are compared
with those of the first run alone. The engine of (b) to (d) has the settings of a server: chat first, a quarter of the
time, at most a tenth of a second of nonces at once.

Figures so far are written after every change, and at `--limit` seconds the run ends with what it has.

    . .vllm/setup.sh; export PYTHONPATH=$PWD/src:$PYTHONPATH
    cd research/benchmarks; python3 vllm_direct.py -o $OUT/vllm_direct.json

A run that shows on a CPU that everything works:

    python vllm_direct.py --models reference:qwen3 --device cpu --dtype float32 --seq-len 32 \
        --batched-tokens 256 --batch-size 8 --seconds 1 --turns 1 --chat 6 --singles 2 --tokens 4 --limit 1200
"""

import asyncio
import contextlib
import gc
import io
import os
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from _common import note, parser, publish

from assay import poc
from assay.models import load_model, save_random
from assay.poc import HFEngine
from assay.poc.engines.hf.engine import auto_batch
from assay.poc.engines.hf.fused import worth_compiling

PATHS = {"requests": "requests", "direct": "auto"}
PAUSE = 1.6  # seconds between single requests, more than the time until an engine counts as idle
CHECKED = 64  # nonces whose values are compared


class Report:
    """The figures so far, in the output file after every change, and the end of the run at its limit."""

    def __init__(self, arguments):
        self.arguments, self.rows, self.started = arguments, [], time.monotonic()
        self.figures = {"seq_len": arguments.seq_len, "batched_tokens": arguments.batched_tokens, "rows": self.rows}
        self.figures |= {"dtype": arguments.dtype, "wait_seconds": arguments.wait}
        timer = threading.Timer(arguments.limit, self._end)
        timer.daemon = True
        timer.start()

    def left(self):
        """Return the seconds that are left."""
        return self.arguments.limit - (time.monotonic() - self.started)

    def put(self, row, **figures):
        """Add figures to a row."""
        row.update(figures)
        note(f"{time.monotonic() - self.started:5.0f} s  {figures}")
        self.write()

    def write(self):
        """Write the figures so far."""
        with contextlib.redirect_stdout(io.StringIO()):
            publish("vllm_direct", self.figures, self.arguments.output)

    def _end(self):
        note("the time is over")
        self.figures["ended_early"] = True
        self.write()
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(3)


def round_of(block, seq_len, preset="poc-2.0"):
    """Return a round."""
    return poc.Round(block_hash=block, public_key="k", seq_len=seq_len, preset=preset, model="m")


def timed(work, rate, seconds):
    """Return the rate of ``work(count)`` for as many seconds, given a guess of it."""
    count = max(8, int(rate * seconds))
    started = time.perf_counter()
    work(count)
    return count / (time.perf_counter() - started)


def measured(work, seconds, turns=1):
    """Return rates after a warm-up, which also says how many fit into the time."""
    work(8)
    rate = timed(work, timed(work, 0, 0), seconds / 4)
    return [timed(work, rate, seconds) for _ in range(turns)]


def prover(engine, model, folder, name):
    """Return a function that proves so many nonces of a new block, into a file."""

    def work(count):
        round = round_of(f"{name}-{time.time_ns()}", engine.seq_len)
        poc.prove(model, round, range(count), engine=engine, output=Path(folder) / f"{name}.jsonl", overwrite=True)

    return work


def transformers(report, row, checkpoint, folder):
    """(a): compiled transformers; return what it publishes of some nonces."""
    arguments = report.arguments
    model = load_model(checkpoint, dtype=arguments.dtype, device=arguments.device)
    size = arguments.batch_size or auto_batch(model, arguments.seq_len)
    compiled = worth_compiling(model)
    engine = HFEngine(model, batch_size=size, seq_len=arguments.seq_len, compiled=compiled)
    rates = measured(prover(engine, model, folder, "hf"), arguments.seconds, arguments.turns)
    report.put(row, transformers={"per_second": rates, "batch_size": size, "compiled": compiled})
    return {preset: values(engine, model, preset, arguments.seq_len) for preset in ("poc-2.0", "hardened")}


def values(engine, model, preset, seq_len):
    """Return what is published of the nonces that are compared."""
    records = poc.prove(model, round_of("compare", seq_len, preset), range(CHECKED), engine=engine).records
    return np.array([r.distance if r.vector is None else r.vector for r in records], np.float64)


def prefill(engine, count):
    """Run so many random prompts of the length of a nonce, one token each, all at once."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
    draw = np.random.default_rng(time.time_ns())
    prompts = draw.integers(10, engine.vocab_size, (count, engine.seq_len)).tolist()

    async def one(index):
        prompt = {"type": "token", "prompt_token_ids": prompts[index]}
        async for _ in engine._client._llm.generate(prompt, sampling, f"prefill-{index}-{time.time_ns()}"):
            pass

    async def run():
        await asyncio.gather(*(one(index) for index in range(count)))

    asyncio.run_coroutine_threadsafe(run(), engine._loop).result()


def take(engine, path):
    """Choose a path; return the engine's counts of the direct one."""
    throttle = engine._client.throttle
    throttle.settings = replace(throttle.settings, path=PATHS[path])
    return engine._client.direct.describe()


def paths(report, row, engine, folder, theirs):
    """(b) to (d) in turns, and how far the values are apart."""
    arguments, found = report.arguments, {}
    works = {"own_prefill": lambda count: prefill(engine, count)}
    works |= {path: prover(engine, engine.model, folder, path) for path in PATHS}
    rates = {name: [] for name in works}
    for turn in range(arguments.turns):
        for name in works if turn % 2 else reversed(works):
            if name in PATHS:
                take(engine, name)
            rates[name] += measured(works[name], arguments.seconds)
            report.put(row, vllm=rates)
    best = {name: statistics.median(seen) for name, seen in rates.items()}
    batched = [path for path in PATHS if path != "requests"]
    for preset, expected in theirs.items():
        taken = {"transformers": expected}
        for path in PATHS:
            take(engine, path)
            taken[path] = values(engine, engine.model, preset, arguments.seq_len)
        found[preset] = {
            f"{path}_from_{other}": distance(taken[path], taken[other])
            for path in batched
            for other in ("requests", "transformers")
            if other in taken
        }
    if "transformers" in row:
        best["transformers"] = statistics.median(row["transformers"]["per_second"])
    others = ("own_prefill", "requests", "transformers")
    ratios = {f"{path}_over_{name}": best[path] / best[name] for path in batched for name in others if name in best}
    for path in batched:
        described = take(engine, path)
        report.put(row, **{path: described | {"fingerprint": engine.fingerprint.as_dict()}})
    report.put(row, ratios=ratios, residuals=found)


def distance(one, other):
    """Return the median and the largest distance of two sets of values."""
    apart = np.abs(one - other)
    return [float(np.median(apart)), float(apart.max())]


async def ask(engine, index, tokens):
    """Send one request of chat; return its tokens and the seconds to the first."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.DELTA
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, detokenize=False, ignore_eos=True, output_kind=kind)
    prompt = np.random.default_rng(index).integers(10, engine.vocab_size, 64).tolist()
    started, first, ids = time.perf_counter(), None, []
    prompt = {"type": "token", "prompt_token_ids": prompt}
    async for output in engine._client._llm.generate(prompt, sampling, f"chat-{index}-{time.time_ns()}"):
        first = first or time.perf_counter() - started
        ids += output.outputs[0].token_ids
    return ids, first


def talk(engine, count, interval, tokens):
    """Send requests at fixed times."""

    async def run():
        began = time.perf_counter()

        async def one(index):
            await asyncio.sleep(max(0.0, began + index * interval - time.perf_counter()))
            return await ask(engine, index, tokens)

        return await asyncio.gather(*(one(index) for index in range(count)))

    return asyncio.run_coroutine_threadsafe(run(), engine._loop).result()


@contextlib.contextmanager
def nonces_running(engine, counted):
    """Run a round in the background; ``counted`` gets the nonces that have run."""
    ended = threading.Event()

    def work():
        outputs = engine.outputs(
            round_of(f"{time.time_ns()}", engine.seq_len), poc.get_pipeline("poc-2.0"), range(2**40)
        )
        for batch in outputs:
            counted.append(len(batch))
            if ended.is_set():
                break
        outputs.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while not counted:
            time.sleep(0.05)
        yield
    finally:
        ended.set()
        thread.join()


def milliseconds(runs):
    """Return the 50th and the 95th percentile, and the largest time to the first token."""
    return [round(1e3 * float(value), 2) for value in np.quantile([first for _, first in runs], [0.5, 0.95, 1.0])]


def same(runs, others):
    """Return how many requests have the same tokens in both runs."""
    return sum(one[0] == other[0] for one, other in zip(runs, others, strict=True))


def chat(report, row, engine, path):
    """Chat alone, and beside a round on a path: many requests, and single ones after pauses."""
    arguments, counted = report.arguments, []
    take(engine, path)
    for kind, count, interval in (
        ("ten_a_second", arguments.chat, 0.1),
        ("after_pauses", arguments.singles, PAUSE),
    ):
        alone, again = (talk(engine, count, interval, arguments.tokens) for _ in range(2))
        with nonces_running(engine, counted):
            time.sleep(PAUSE)  # calls have their length
            before, started = sum(counted), time.perf_counter()
            beside = talk(engine, count, interval, arguments.tokens)
            rate = (sum(counted) - before) / (time.perf_counter() - started)
        figures = {"requests": count, "alone_ms": milliseconds(alone + again), "beside_ms": milliseconds(beside)}
        figures["ratios"] = [b / a for a, b in zip(figures["alone_ms"], figures["beside_ms"], strict=True)]
        figures |= {"same_tokens_alone_again": same(again, alone), "same_tokens_beside": same(beside, alone)}
        figures["nonces_per_second_meanwhile"] = rate
        report.put(row, **{f"chat_{kind}" if path == "direct" else f"{path}_chat_{kind}": figures})


def measure(report, row, checkpoint, folder):
    """Measure one model on transformers and in an engine of vLLM."""
    from assay.poc.vllm.engine import VLLMEngine

    arguments = report.arguments
    theirs = {} if arguments.skip_transformers else transformers(report, row, checkpoint, folder)
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
        limits = {"gpu_memory_utilization": 0.5}
    else:
        limits = {"enforce_eager": True}
    limits |= {"max_model_len": arguments.seq_len + 256, "max_num_batched_tokens": arguments.batched_tokens}
    started = time.perf_counter()
    shape = {"batch_size": 128, "seq_len": arguments.seq_len, "dtype": arguments.dtype}
    with VLLMEngine(checkpoint, **shape, **limits, scheduling_policy="priority") as engine:
        start = time.perf_counter() - started
        report.put(row, fingerprint=engine.fingerprint.as_dict(), start_seconds=start)
        throttle = engine._client.throttle
        throttle.settings = replace(throttle.settings, wait=arguments.wait, in_flight=0)
        paths(report, row, engine, folder, theirs)
        if arguments.chat and report.left() > 60:
            chat(report, row, engine, "direct")
        report.put(row, held=engine.counts())


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
    made.add_argument("--singles", type=int, default=6, help="requests after pauses")
    made.add_argument("--tokens", type=int, default=24, help="of a request")
    made.add_argument("--skip-transformers", action="store_true")
    made.add_argument("--limit", type=float, default=480.0, help="seconds after which the run ends")
    arguments = made.parse_args()
    report = Report(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(arguments.models):
            checkpoint = model
            if ":" in model:  # a shape, or a bundled model, with random weights
                path = Path(folder) / f"model{number}"
                made = {"weights": "random-all", "block_hash": "bench", "dtype": arguments.dtype}
                checkpoint = str(save_random(model, path, **made))
            row = {"model": model}
            report.rows.append(row)
            own = Path(folder) / f"proofs{number}"
            own.mkdir()
            try:
                measure(report, row, checkpoint, own)
            except Exception as error:
                report.put(row, error=f"{type(error).__name__}: {error}"[:2000])
    publish("vllm_direct", report.figures, arguments.output)


if __name__ == "__main__":
    main()
