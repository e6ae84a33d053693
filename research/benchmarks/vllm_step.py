"""Where the time of one decoding step of vLLM goes with seeded responses, and without.

One engine in this process answers the same requests in turns: plain ones, which vLLM samples; seeded ones, whose tokens
the processor chooses and whose states are captured. No server, no client and no other process is in the figure. Each
turn gives the milliseconds of a step, of the clock and of the processor, and those of the host in each part. A profile
of a few further steps gives, on a GPU, the kernels: their number, their time, and what seeded steps have more of.

    python vllm_step.py --requests 8
    python vllm_step.py --gpu --model shape:qwen3-0.6b --dtype bfloat16 --requests 32
"""

import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from functools import wraps
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported: the engine runs in this process
os.environ.setdefault("VLLM_PLUGINS", "")

import itertools

import torch
from _common import note, parser, publish
from _vllm import REFERENCE

from assay.models import save_random
from assay.poc.engines.vllm import runner_kind
from assay.poc.responses import ResponseSeed, Sampling
from assay.poc.responses.vllm._carried import ARGUMENT, Carried, as_words
from assay.poc.responses.vllm._extension import Capture
from assay.poc.responses.vllm._recorder import NEUTRAL
from assay.poc.responses.vllm._refusals import EXTENSION, PROCESSORS

PROMPT = 64
WARM = 12  # steps of a turn that do not count: the prompts are among them
PROFILED = 8
LISTED = 12
SECONDS = Counter()
"""Seconds of the host by part since it was cleared; those of a part include those of parts inside it."""


def engine_of(arguments, folder):
    """Return an engine with the processor and the extension, on a CPU or a GPU."""
    from vllm import LLM

    time_method(Capture, "_open", "capture, requests")  # before the model runner is wrapped with them
    time_method(Capture, "_capture", "capture, states")
    kind = "v2" if arguments.gpu else "v1"
    options = {"gpu_memory_utilization": 0.3} if arguments.gpu else {"enforce_eager": True, "max_model_len": 512}
    llm = LLM(
        model=folder,
        dtype=arguments.dtype,
        worker_extension_cls=EXTENSION,
        logits_processors=[PROCESSORS[kind]],
        distributed_executor_backend="uni",
        max_num_seqs=max(arguments.requests, 8),
        enable_prompt_embeds=True,
        disable_log_stats=True,
        **options,
    )
    problems = [name for found in llm.collective_rpc("assay_sketch") for name in found]
    assert not problems, problems
    return llm


def time_method(owner, method, name):
    """Add the seconds of a method, of one object or of a class, to those of a part."""
    call = getattr(owner, method)

    @wraps(call)
    def wrapped(*args, **kwargs):
        begun = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            SECONDS[name] += time.perf_counter() - begun

    setattr(owner, method, wrapped)


def time_parts(llm):
    """Time the parts of a step, on the host, from now on."""
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    if runner_kind(runner) == "v2":
        processors = runner.sampler.logits_processors
    else:
        processors = runner.input_batch.logitsprocs.non_argmax_invariant
    ours = next(one for one in processors if type(one).__module__.startswith("assay."))
    time_method(core.scheduler, "schedule", "schedule")
    time_method(core.scheduler, "update_from_output", "update")
    time_method(runner, "execute_model", "execute_model")
    time_method(runner, "sample_tokens", "sample_tokens")
    time_method(ours, "apply", "processor")


def requests_of(way, count, tokens, sampling):
    """Return the parameters of the requests of one turn."""
    from vllm import SamplingParams

    for number in range(count):
        if way == "plain":
            values = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": number}
        else:
            seed = ResponseSeed(
                user_seed=str(number), request_id=way, public_key="node", digest="0" * 64, block_hash="block", index=0
            )
            carried = Carried(PROMPT, as_words(seed.words("sketch")), as_words(seed.words()), sampling)
            values = NEUTRAL | {"extra_args": {ARGUMENT: carried.as_argument()}}
        yield SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, **values)


def turn(llm, way, arguments, sampling, *, profile=False):
    """Run the requests of one way together; return the figures of a step, or what the profiler says of some."""
    engine, tokens = llm.llm_engine, arguments.steps + WARM + 2
    names = [f"{way}-{time.time_ns()}-{number}" for number in range(arguments.requests)]
    for number, params in enumerate(requests_of(way, arguments.requests, tokens, sampling)):
        prompt = {"prompt_token_ids": list(range(100 + number % 50, 100 + PROMPT + number % 50))}
        engine.add_request(names[number], prompt, params)
    for _ in range(WARM):
        engine.step()
    figures = profiled(engine) if profile else stepped(engine, arguments.steps)
    while engine.has_unfinished_requests():
        engine.step()
    llm.collective_rpc("assay_sketches", args=({}, names))
    return figures


def stepped(engine, steps):
    """Return the milliseconds of a step, and of its parts on the host."""
    SECONDS.clear()
    computed, ends = time.process_time(), [time.perf_counter()]
    for _ in range(steps):
        engine.step()
        ends.append(time.perf_counter())
    whole = statistics.median(b - a for a, b in itertools.pairwise(ends))
    figures = {"step": 1e3 * whole, "processor time": 1e3 * (time.process_time() - computed) / steps}
    return figures | {name: 1e3 * seconds / steps for name, seconds in SECONDS.items()}


def profiled(engine):
    """Return the operations of a few steps and, on a GPU, their kernels, by name: number and microseconds a step."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(PROFILED):
            engine.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    found = {}
    for one in profile.key_averages():
        on_device = float(one.self_device_time_total) if torch.cuda.is_available() else 0.0
        found[one.key] = (one.count / PROFILED, one.self_cpu_time_total / PROFILED, on_device / PROFILED)
    return found


def compared(plain, seeded):
    """Return what the seeded steps have more of than plain ones, the largest differences first."""
    rows = []
    for name in sorted({*plain, *seeded}):
        a, b = plain.get(name, (0.0, 0.0, 0.0)), seeded.get(name, (0.0, 0.0, 0.0))
        count, host, device = (round(y - x, 2) for x, y in zip(a, b, strict=True))
        rows.append({"name": name[:100], "more_calls": count, "more_host_us": host, "more_device_us": device})
    kept = {}
    for key in ("more_host_us", "more_device_us"):
        largest = sorted(rows, key=lambda row: -abs(row[key]))[:LISTED]
        kept |= {row["name"]: row for row in largest if row[key]}
    sums = {
        way: {"calls": sum(x[0] for x in found.values()), "device_us": sum(x[2] for x in found.values())}
        for way, found in (("plain", plain), ("seeded", seeded))
    }
    return {"sums": sums, "differences": list(kept.values())}


def measured(arguments, folder):
    """Return the figures of both ways, turn by turn, and what a profile says."""
    sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p)
    llm = engine_of(arguments, folder)
    time_parts(llm)
    turns = {"plain": [], "seeded": []}
    for number in range(arguments.turns + 1):
        for way in ("plain", "seeded") if number % 2 else ("seeded", "plain"):
            figures = turn(llm, way, arguments, sampling)
            note(f"turn {number} {way}: {figures['step']:.3f} ms")
            if number:  # the first one warms up
                turns[way].append(figures)
    median = {
        way: {name: statistics.median(one.get(name, 0.0) for one in of) for name in of[0]} for way, of in turns.items()
    }
    both = list(zip(turns["plain"], turns["seeded"], strict=True))
    ratios = {name: [a[name] / b[name] for a, b in both] for name in ("step", "processor time")}
    profiles = {way: turn(llm, way, arguments, sampling, profile=True) for way in turns}
    return {
        "median_ms": median,
        "plain_over_seeded": {
            name: {"median": statistics.median(of), "quartiles": statistics.quantiles(of, n=4)[::2]}
            for name, of in ratios.items()
        },
        "load": os.getloadavg(),
        "profile": compared(**profiles),
    }


def main():
    made = parser(__doc__)
    made.add_argument("--requests", type=int, default=8, help="that decode together")
    made.add_argument("--steps", type=int, default=96, help="of a turn")
    made.add_argument("--turns", type=int, default=6)
    made.add_argument("--temperature", type=float, default=1.0)
    made.add_argument("--top-p", type=float, default=1.0)
    made.add_argument("--model", default=str(REFERENCE))
    made.add_argument("--dtype", default="float32")
    made.add_argument("--gpu", action="store_true", help="the V2 runner with compiled layers and graphs")
    arguments = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model.startswith("shape:"):
            model = str(save_random(model, Path(folder) / "made", weights="random-all", dtype=arguments.dtype))
            for file in REFERENCE.glob("tokenizer*"):
                shutil.copy(file, model)
        given = {name: getattr(arguments, name) for name in ("requests", "steps", "temperature", "top_p", "dtype")}
        figures = {"model": Path(arguments.model).name, **given, **measured(arguments, model)}
    publish("vllm_step", figures, arguments.output)


if __name__ == "__main__":
    main()
