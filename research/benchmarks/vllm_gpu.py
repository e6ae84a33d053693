"""vLLM on a GPU beside transformers on the same GPU: agreement, verdicts and nonces per second, by kind of engine.

Every case starts an engine of its own in vLLM and proves the same nonces as transformers does, in the same dtype and
in float32. The noise between the two is calibrated, and judged with it are an honest node and one with four bits.

    python benchmarks/vllm_gpu.py --cases v2-bf16 v1-bf16 v2-fp32 v2-0.6b -o benchmarks/results/vllm_gpu.json
"""

import asyncio
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _common import note, parser, publish
from vllm_support import published, verdict

from assay import poc
from assay.errors import AssayError
from assay.models import load_model, save_random
from assay.poc.engines.hf import HFEngine
from assay.research.cheats import rounded

COMMON = {"gpu_memory_utilization": 0.3, "max_model_len": 512}
EAGER = {"enforce_eager": True}
CASES = {  # model, dtype, environment, options
    "v2-bf16": ("reference:qwen3", "bfloat16", {}, {}),
    "v2-bf16-eager": ("reference:qwen3", "bfloat16", {}, EAGER),
    "v2-bf16-chunks": ("reference:qwen3", "bfloat16", {}, EAGER | {"max_num_batched_tokens": 352}),
    "v2-fp32": ("reference:qwen3", "float32", {}, EAGER),
    "v1-bf16": ("reference:qwen3", "bfloat16", {"VLLM_USE_V2_MODEL_RUNNER": "0"}, {}),
    "v1-fp32": ("reference:qwen3", "float32", {"VLLM_USE_V2_MODEL_RUNNER": "0"}, EAGER),
    "v2-0.6b": ("shape:qwen3-0.6b", "bfloat16", {}, {}),
    "v2-tp2": ("reference:qwen3", "bfloat16", {}, EAGER | {"tensor_parallel_size": 2}),
    "v2-pp2": ("reference:qwen3", "bfloat16", {}, EAGER | {"pipeline_parallel_size": 2}),
}
PRESETS = ("poc-2.0", "artifact", "hardened")


def quartiles(values):
    """Return the quartiles and the largest of the absolute values."""
    return [float(value) for value in np.quantile(np.abs(values), [0.25, 0.5, 0.75, 1.0])]


def rate(engine, model, seq_len, count):
    """Return nonces per second, after a warm-up."""
    seconds = []
    for block, number in (("warm", engine.batch_size), ("timed", count)):
        started = time.perf_counter()
        poc.prove(model, poc.Round(block_hash=block, public_key="k", seq_len=seq_len), range(number), engine=engine)
        seconds.append(time.perf_counter() - started)
    return count / seconds[-1]


def prefill(engine, seq_len, count, concurrency):
    """Return prompts per second of the same engine for random tokens that no cache knows, one token generated each."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
    tokens = np.random.default_rng(0).integers(0, engine.vocab_size, (count, seq_len)).tolist()

    async def run():
        gate = asyncio.Semaphore(concurrency)

        async def one(index):
            async with gate:
                prompt = {"type": "token", "prompt_token_ids": tokens[index]}
                async for _ in engine._client._llm.generate(prompt, sampling, f"prefill-{index}-{time.time_ns()}"):
                    pass

        started = time.perf_counter()
        await asyncio.gather(*(one(index) for index in range(count)))
        return count / (time.perf_counter() - started)

    return asyncio.run_coroutine_threadsafe(run(), engine._loop).result()


def compare(engine, models, seq_len, count):
    """Return the residuals and verdicts of one engine against transformers."""
    rows = {}
    for preset in PRESETS:
        round = poc.Round(block_hash="across", public_key="k", seq_len=seq_len, preset=preset, model="m")
        ours = poc.prove(engine.model, round, range(count), engine=engine)
        theirs = {name: plain(model, round, count) for name, model in models.items()}
        row = {f"residuals_{name}": quartiles(published(ours) - published(proof)) for name, proof in theirs.items()}
        if "same dtype" in theirs and "four bits" in theirs:
            calibration = poc.calibrate(ours, theirs["same dtype"])
            judge = {"sample": 64, "seed": 1, "calibration": calibration}
            back = {"engine": engine} | judge
            fresh = poc.Round(block_hash="fresh", public_key="k", seq_len=seq_len, preset=preset, model="m")
            honest = poc.prove(engine.model, fresh, range(64), engine=engine)
            reverse, cheat = (plain(models[name], fresh, 64) for name in ("same dtype", "four bits"))
            row["law"] = str(calibration.builds[0].noise.law)
            row["vllm_on_transformers"] = verdict(honest, models["same dtype"], **judge)
            row["transformers_on_vllm"] = verdict(reverse, engine.model, **back)
            row["four_bits_on_vllm"] = verdict(cheat, engine.model, **back)
        rows[preset] = row
    return rows


def plain(model, round, count):
    """Prove on transformers with its own kernels, which the verifier uses too."""
    return poc.prove(model, round, range(count), engine=HFEngine(model, batch_size=32, seq_len=round.seq_len))


def measure(name, arguments, folder):
    """Run one case."""
    from assay.poc.engines.vllm import VLLMEngine

    reference, dtype, environment, options = CASES[name]
    os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    os.environ.update(environment)
    if reference.startswith("shape:"):
        path = Path(folder) / reference.partition(":")[2]
        reference = str(path if path.exists() else save_random(reference, path, weights="random-all", dtype=dtype))
    models = {"same dtype": load_model(reference, dtype=dtype, device="cuda")}
    if not arguments.quick:
        models["float32"] = load_model(reference, dtype="float32", device="cuda")
        models["four bits"] = rounded(models["same dtype"], 4)
    shape = {"batch_size": 32, "seq_len": arguments.seq_len, "dtype": dtype}
    started = time.perf_counter()
    with VLLMEngine(reference, **shape, **(COMMON | options)) as engine:
        start = time.perf_counter() - started
        note(f"{name}: started in {start:.0f} s: {engine.fingerprint}")
        row = {"name": name, "fingerprint": engine.fingerprint.as_dict(), "start_seconds": start}
        row["presets"] = compare(engine, models, arguments.seq_len, arguments.count)
        row["nonces_per_second"] = rate(engine, engine.model, arguments.seq_len, arguments.rate)
        hf = HFEngine(models["same dtype"], batch_size=128, seq_len=arguments.seq_len)
        row["nonces_per_second_transformers"] = rate(hf, models["same dtype"], arguments.seq_len, arguments.rate)
        own = [prefill(engine, arguments.seq_len, arguments.rate, engine._client.throttle._capacity) for _ in range(2)]
        row["own_prefill_per_second"], row["nonces_at_once"] = own[-1], engine._client.throttle._capacity
        row["ratio_to_own_prefill"] = row["nonces_per_second"] / own[-1]
        row["held"] = engine.counts()
    note(str(row))
    return row


def main():
    made = parser(__doc__)
    made.add_argument("--cases", nargs="+", choices=sorted(CASES), default=["v2-bf16", "v1-bf16", "v2-fp32", "v2-0.6b"])
    made.add_argument("--count", type=int, default=256, help="nonces whose values are compared")
    made.add_argument("--rate", type=int, default=2048, help="nonces that are timed")
    made.add_argument("--seq-len", type=int, default=256)
    made.add_argument("--quick", action="store_true", help="compare with the same dtype only, without verdicts")
    arguments = made.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.cases:
            try:
                rows.append(measure(name, arguments, folder))
            except AssayError as error:
                rows.append({"name": name, "error": str(error)})
                note(f"{name}: {error}")
            torch.cuda.empty_cache()
            figures = {"seq_len": arguments.seq_len, "compared": arguments.count, "timed": arguments.rate}
            publish("vllm_gpu", figures | {"cases": rows}, arguments.output)


if __name__ == "__main__":
    main()
