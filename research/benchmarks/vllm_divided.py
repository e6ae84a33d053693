"""Nonces of a model that vLLM divides over devices, beside one device and beside transformers.

Every case is a process with an engine of its own. All start at once, prove the same nonces of two
blocks, answer chat beside a round, and wait for each other, and for other programs on the devices;
then they take turns at the speed. So that they fit beside each other each is told the size of its
cache, and then passes are of few nonces and no CUDA graphs: what an engine can do is seen with
`--alone`, one case after the other. In one case a worker is killed inside a round, which must end
with an error that says so; started again, the engine proves the same nonces.

- Residuals are to transformers, and to one device. The law of `tokens-1` is that of `calibrate`
  between one device and transformers, on another block. That of chain-decode comes with the bundled
  model. The cheat is the model in four bits, on transformers.
- `bare` is the divided forward pass by itself: vLLM's own dummy passes over as many random tokens,
  in every worker, without sampling or scheduler. Stages compute at once and send nothing. `prefill`
  is what the same engine makes of the same prompts as requests for one token.
- `between` is a round into which chat comes at random times, so that engines that step together go
  from calls to steps and back many times.

The large models have random weights, so their laws speak of rounding alone.

    . .vllm/setup.sh; export PYTHONPATH=$PWD/src:$PWD/research/src:$PYTHONPATH
    python3 research/benchmarks/vllm_divided.py -o research/results/vllm_divided_h200x2.json

On two cores, one case after the other:

    .venv-vllm/bin/python research/benchmarks/vllm_divided.py --device cpu --cases one "tp 2" \
      --model reference:qwen3 --seq-len 64 --nonces 32 --speed 64 -o OUTPUT
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from _common import note, parser, publish, round_to
from _vllm import answer

from assay import poc
from assay.errors import AssayError
from assay.models import load_model
from assay.models.frame import Frame
from assay.models.resolve import resolve
from assay.poc import HFEngine, Round, cheats, measure_frame
from assay.poc.prover import compute
from assay.poc.verdict.calibration_file import noise_for
from assay.poc.verdict.residuals import residuals
from assay.poc.verdict.sample_plan import sequential_test

BLOCKS = ("law", "fresh")
BATCH = 64
CHAT = (8, 24)  # requests and tokens of each
TURNS = 2
QUIET = 0.05  # seconds after chat until calls begin again, in a round with chat between
IDLE_SECONDS = 5  # for which devices do nothing before turns begin
MIXTURE = {
    "hidden_size": 2048,
    "num_hidden_layers": 6,
    "num_experts": 48,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
}


@dataclass(frozen=True)
class Case:
    """How an engine divides which weights, and which preset it proves."""

    options: dict
    weights: str = "dense"
    chain: bool = False
    killed: bool = False


TENSOR = {"tensor_parallel_size": 2}
# Two stages work on a step each, and the next one is ready.
STAGES = {"pipeline_parallel_size": 2, "max_num_seqs": 3 * BATCH, "kv_cache_memory_bytes": 2**33}
ENGINES = {"data_parallel_size": 2}
EXPERTS = {"enable_expert_parallel": True}
CASES = {
    "one": Case({}),
    "tp 2": Case(TENSOR),
    "tp 4": Case({"tensor_parallel_size": 4}),
    "pp 2": Case(STAGES),
    "dp 2": Case(ENGINES),
    "mixture, one": Case({}, "mixture"),
    "mixture, tp 2": Case(TENSOR, "mixture"),
    "mixture, tp 2, experts dealt": Case(TENSOR | EXPERTS, "mixture"),
    "mixture, pp 2": Case(STAGES, "mixture"),
    "mixture, dp 2, experts dealt": Case(ENGINES | EXPERTS, "mixture"),
    "killed, tp 2": Case(TENSOR, "bundled", killed=True),
    "chain, one": Case({}, "bundled", chain=True),
    "chain, tp 2": Case(TENSOR, "bundled", chain=True),
    "chain, tp 4": Case({"tensor_parallel_size": 4}, "bundled", chain=True),
    "chain, dp 2": Case(ENGINES, "bundled", chain=True),
}


def file_name(name):
    """Return the name of a case as files have it."""
    return name.replace(", ", "-").replace(" ", "")


def preset_of(case, chosen):
    """Return the preset of a case."""
    return f"chain-decode-{chosen.steps}" if case.chain else "tokens-1"


def round_of(case, chosen, block):
    """Return the round of a block."""
    return Round(
        block_hash=block, public_key="k", seq_len=chosen.seq_len, preset=preset_of(case, chosen)
    )


# One case, in a process of its own


def bare_passes(worker, tokens, passes):
    """Run dummy passes over random tokens in a worker; return their seconds.

    Products of zeros need less power, so that a GPU is faster with vLLM's usual dummies. They write
    no keys and values, so attention reads random ones.
    """
    with routed_dummies():
        return timed_passes(worker.model_runner, tokens, passes)


@contextmanager
def routed_dummies():
    """Let the V2 runner's dummy passes compute experts: it marks their tokens as padding, which no
    router gives to an expert.
    """
    from vllm.v1.worker.gpu.input_batch import InputBatch

    make_dummy = InputBatch.make_dummy

    def make_routed(*arguments, **options):
        return make_dummy(*arguments, **options | {"is_padding": False})

    InputBatch.make_dummy = make_routed
    try:
        yield
    finally:
        InputBatch.make_dummy = make_dummy


def timed_passes(runner, tokens, passes):
    """Run dummy passes, and return the seconds of all but a first one."""
    from vllm.distributed import get_pp_group

    on_cuda = runner.device.type == "cuda"
    for cache in runner.kv_caches:
        if cache.is_floating_point():
            cache.normal_()
    if not get_pp_group().is_first_rank:
        for tensor in runner.intermediate_tensors.tensors.values():
            tensor.normal_()
    seconds = 0.0
    for count in (1, passes):
        if on_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            runner._dummy_run(tokens, randomize_inputs=True)
        if on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return seconds


class Measured:
    """A case that is measured in this process, and its row in the folder."""

    def __init__(self, name, chosen):
        self.name = name
        self.case = CASES[name]
        self.chosen = chosen
        self.path = chosen.folder / f"{file_name(name)}.json"
        self.row = {"name": name, "preset": preset_of(self.case, chosen)}

    def write(self, **figures):
        """Add figures to the row, and write it in one piece."""
        self.row |= figures
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.row))
        part.replace(self.path)

    def engine(self):
        """Start the engine."""
        from assay.poc.vllm.vllm_engine import VLLMEngine

        chosen = self.chosen
        steps = chosen.steps if self.case.chain else 0
        length = chosen.seq_len + steps + 2
        options = {"max_model_len": length, "max_num_seqs": BATCH}
        options["max_num_batched_tokens"] = max(length, BATCH * chosen.seq_len)
        if chosen.device == "cuda" and chosen.alone:
            options["gpu_memory_utilization"] = 0.5
        elif chosen.device == "cuda":
            cache = (1 if self.case.weights == "bundled" else 3) * 2**30
            options |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": cache}
        if self.case.chain or self.case.killed or chosen.device == "cpu":
            options["enforce_eager"] = True
        weights = chosen.folder / self.case.weights
        frame = None if self.case.chain else Frame.load(weights.with_suffix(".frame"))
        return VLLMEngine(
            str(weights),
            dtype=chosen.dtype,
            batch_size=BATCH,
            seq_len=chosen.seq_len,
            frame=frame,
            in_flight=BATCH if self.case.chain else 0,
            **options | self.case.options,
        )

    def prove(self, engine, block, count):
        """Prove nonces of a block."""
        round = round_of(self.case, self.chosen, block)
        return poc.prove(engine.model, round, range(count), engine=engine)

    def measure(self):
        """Measure, and write the row after every part."""
        began = time.monotonic()
        with self.engine() as engine:
            self.write(
                start_seconds=round_to(time.monotonic() - began, 3),
                fingerprint=engine.fingerprint.as_dict(),
            )
            for block in BLOCKS:
                proof = self.prove(engine, block, self.chosen.nonces)
                proof.save(self.chosen.folder / f"{file_name(self.name)}-{block}.jsonl")
            self.write(direct=engine.client.direct.describe(), held=engine.counts())
            if self.case.killed:
                self.write(killed=self.kill(engine))
            elif not self.case.chain:
                self.write(chat=self.chat(engine), ready=True)
                self.wait_for_turn()
                self.write(speed=self.speed(engine))
                self.write(between=self.between(engine))
        if self.case.killed:
            self.write(started_again=self.again())
        self.write(ready=True, done=True)

    def wait_for_turn(self):
        """Wait for the file that the first process writes when it is this case's turn."""
        while not self.path.with_suffix(".turn").exists():
            time.sleep(0.1)

    def chat(self, engine):
        """Return how many answers beside a round are those without one."""
        requests, tokens = CHAT
        prompts = [[7 + index, *range(20, 20 + 31)] for index in range(requests)]

        async def ask():
            return [(await answer(engine, prompt, tokens))[0] for prompt in prompts]

        def start():
            return asyncio.run_coroutine_threadsafe(ask(), engine.client.loop)

        alone = start().result()
        asking = start()
        proof = self.prove(engine, "chat", self.chosen.nonces)
        beside = asking.result()
        return {
            "requests": requests,
            "equal": sum(map(list.__eq__, alone, beside)),
            "nonces_beside": len(proof.records),
        }

    def between(self, engine):
        """Return what ran of a round into which chat came every now and then."""
        client = engine.client
        client.throttle.settings = client.throttle.settings.model_copy(update={"quiet": QUIET})
        calls = client.direct.calls
        answers = []
        draw = random.Random(1)

        async def ask():
            while True:
                await asyncio.sleep(draw.uniform(0.0, 0.6))
                tokens = await answer(engine, [7, *range(20, 50)], draw.randint(1, 24))
                answers.append(len(tokens[0]))

        asking = asyncio.run_coroutine_threadsafe(ask(), client.loop)
        began = time.monotonic()
        try:
            proof = self.prove(engine, "between", 3 * self.chosen.speed)
        finally:
            asking.cancel()
        return {
            "nonces": len(proof.records),
            "seconds": round_to(time.monotonic() - began, 3),
            "calls": client.direct.calls - calls,
            "answers": len(answers),
        }

    def speed(self, engine):
        """Return nonces a second of proofs, bare passes and prefills, the medians of turns."""
        chosen = self.chosen
        round = round_of(self.case, chosen, "speed")
        llm = engine.client.llm
        # A loop of engines that step by themselves: each makes all of its passes.
        engines = self.case.options.get("data_parallel_size", 1)
        tokens = min(BATCH, chosen.speed) * chosen.seq_len
        passes = max(1, chosen.speed // BATCH // engines)
        run = engine.client.loop
        prompts = [
            np.random.default_rng(nonce)
            .integers(5, engine.model.vocab_size, chosen.seq_len)
            .tolist()
            for nonce in range(chosen.speed)
        ]

        def bare():
            calls = llm.collective_rpc(bare_passes, args=(tokens, passes))
            seconds = asyncio.run_coroutine_threadsafe(calls, run).result()
            return engines * passes * tokens / chosen.seq_len / max(seconds)

        def prefill():
            async def ask():
                await asyncio.gather(*(answer(engine, prompt, 1) for prompt in prompts))

            began = time.perf_counter()
            asyncio.run_coroutine_threadsafe(ask(), run).result()
            return len(prompts) / (time.perf_counter() - began)

        def nonces():
            began = time.perf_counter()
            poc.prove(engine.model, round, range(chosen.speed), engine=engine)
            return chosen.speed / (time.perf_counter() - began)

        ways = {"nonces": nonces, "bare": bare, "prefill": prefill}
        rates = {name: [] for name in ways}
        for turn in range(TURNS + 1):  # the first one warms up
            for name, way in ways.items():
                rate = way()
                if turn:
                    rates[name].append(rate)
        seen = {name: round_to(median(values), 4) for name, values in rates.items()}
        seen["nonces_of_a_pass"] = engine.client.direct.sizers[chosen.seq_len].batch
        of_turns = {
            f"over_{other}": [
                round_to(mine / theirs, 4)
                for mine, theirs in zip(rates["nonces"], rates[other], strict=True)
            ]
            for other in ("bare", "prefill")
        }
        return seen | of_turns

    def kill(self, engine):
        """Kill the last worker inside a round; return what the round says, and after how long."""
        workers = psutil.Process().children(recursive=True)
        last = max(
            (worker for worker in workers if "Worker" in " ".join(worker.cmdline())),
            key=lambda worker: " ".join(worker.cmdline()),
        )
        last.kill()
        began = time.monotonic()
        try:
            self.prove(engine, "killed", 16 * self.chosen.nonces)
        except AssayError as error:
            return {"says": str(error), "seconds": round_to(time.monotonic() - began, 3)}
        return {"says": "nothing: the round went on"}

    def again(self):
        """Start the engine again; return how its nonces differ from those before."""
        with self.engine() as engine:
            proof = self.prove(engine, "fresh", self.chosen.nonces)
        before = poc.Proof.load(self.chosen.folder / f"{file_name(self.name)}-fresh.jsonl")
        return {"largest_residual": float(np.max(residuals(proof.records, before.records)))}


# All cases: checkpoints, processes, turns, judgement


def make_checkpoints(chosen):
    """Write the checkpoints and frames that the cases need."""
    from tests.models.storing import make_mixture

    for weights in {CASES[name].weights for name in chosen.cases}:
        path = chosen.folder / weights
        if weights == "mixture":
            sizes = MIXTURE if chosen.device == "cuda" else {"hidden_size": 256}
            make_mixture("qwen3-moe", path, **sizes)
        elif weights == "dense" and chosen.model.startswith("shape:"):
            # A GPU draws weights a hundred times faster than `save_random`.
            drawn = load_model(
                chosen.model, weights="random-all", dtype=chosen.dtype, device=chosen.device
            )
            drawn.module.save_pretrained(path)
        else:
            path.symlink_to(
                resolve("reference:qwen3" if weights == "bundled" else chosen.model).checkpoint
            )
        model = load_model(str(path), dtype=chosen.dtype, device=chosen.device)
        measure_frame(model).save(path.with_suffix(".frame"))
        note(f"made: {weights}")
        del model
        torch.cuda.empty_cache()


def start(name, chosen):
    """Start the process of a case."""
    environment = dict(os.environ)
    environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for a function that workers run
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # It uses NVLink multicast; a program that is killed in it can spoil a host's devices.
    environment.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    if CASES[name].chain:
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if chosen.device == "cpu" and "tensor_parallel_size" in CASES[name].options:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    words = [sys.executable, __file__, *sys.argv[1:]]
    words += ["--folder", str(chosen.folder), "--child", name]
    with (chosen.folder / f"{file_name(name)}.log").open("wb") as log:
        return subprocess.Popen(
            words, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def read_row(name, chosen):
    """Return what a case has written."""
    path = chosen.folder / f"{file_name(name)}.json"
    return json.loads(path.read_text()) if path.exists() else {"name": name}


def end(process):
    """End a process and what it started."""
    if process.poll() is not None:
        return
    parent = psutil.Process(process.pid)
    tree = [*parent.children(recursive=True), parent]
    for member in tree:
        member.kill()
    psutil.wait_procs(tree, timeout=20)


def wait_until(name, process, chosen, mark, deadline):
    """Wait until a case has written a mark, has ended, or is late; return whether it has."""
    while time.monotonic() < deadline:
        if read_row(name, chosen).get(mark):
            return True
        if process.poll() is not None:
            break
        time.sleep(0.2)
    return bool(read_row(name, chosen).get(mark))


def wait_for_idle(chosen, deadline):
    """Wait until the devices have done nothing for some seconds."""
    idle = 0 if chosen.device == "cuda" else IDLE_SECONDS
    while idle < IDLE_SECONDS and time.monotonic() < deadline:
        devices = range(torch.cuda.device_count())
        idle = 0 if any(torch.cuda.utilization(device) for device in devices) else idle + 1
        time.sleep(1)


def run_cases(chosen):
    """Run the processes of all cases, and give each its turn."""
    deadline = time.monotonic() + chosen.limit
    one_by_one = chosen.alone or chosen.device == "cpu"
    groups = [[name] for name in chosen.cases] if one_by_one else [chosen.cases]
    for names in groups:
        processes = {name: start(name, chosen) for name in names}
        # One that hangs must leave time for the turns of the others.
        ready_by = min(deadline, time.monotonic() + chosen.limit / 2)
        ready = [
            name
            for name, process in processes.items()
            if wait_until(name, process, chosen, "ready", ready_by)
        ]
        note(f"ready: {ready}")
        with suppress(Exception):  # NVML, where it is missing
            wait_for_idle(chosen, time.monotonic() + chosen.limit / 4)
        for name in ready:
            (chosen.folder / f"{file_name(name)}.turn").touch()
            wait_until(name, processes[name], chosen, "done", deadline)
            note(f"done: {name}")
        for process in processes.values():
            end(process)


def recomputed(engine, proof):
    """Return the records of a proof's nonces; a chain replays the points of the proof."""
    inputs = proof.header.round.inputs([record.nonce for record in proof.records])
    batches = compute(engine, proof.header.pipeline, inputs, proof.records)
    return [record for batch in batches for record in batch]


def judge(weights, rows, chosen):
    """Add residuals to transformers and to one device, and verdicts, to the rows of a model."""
    path = chosen.folder / weights
    model = load_model(str(path), dtype=chosen.dtype, device=chosen.device)
    model = model.with_frame(Frame.load(path.with_suffix(".frame")))
    shape = {"batch_size": BATCH, "seq_len": chosen.seq_len}
    engine = HFEngine(model, **shape, compiled=False)
    cheat = HFEngine(cheats.rounded(model, 4), **shape, compiled=False)
    for chain in (False, True):
        alike = {
            name: row
            for name, row in rows.items()
            if (CASES[name].weights, CASES[name].chain) == (weights, chain)
        }
        judge_alike(alike, chosen, model, engine, cheat)


def judge_alike(rows, chosen, model, engine, cheat):
    """Add residuals and verdicts to the rows of one model and preset."""
    proofs = {}
    for name in rows:
        paths = [chosen.folder / f"{file_name(name)}-{block}.jsonl" for block in BLOCKS]
        if all(path.exists() for path in paths):
            proofs[name] = [poc.Proof.load(path) for path in paths]
    if not proofs:
        return
    base = next((name for name in proofs if name.endswith("one")), None)
    first, fresh = next(iter(proofs.values())) if base is None else proofs[base]
    if fresh.header.pipeline.steps:
        noise = noise_for(fresh.header, engine.fingerprint, None)
    elif base is None:
        noise = None
    else:
        theirs = poc.prove(model, first.round, range(chosen.nonces), engine=engine)
        law = poc.calibrate(first, theirs, hidden_size=model.hidden_size).builds[0]
        noise = law.noise_between("", engine.fingerprint, round=fresh.round)
    false = poc.prove(model, fresh.round, range(chosen.nonces), engine=cheat)
    cheated = residuals(false.records, recomputed(engine, false))
    for name, (_, proof) in proofs.items():
        sizes = residuals(proof.records, recomputed(engine, proof))
        row = rows[name]
        row["residual"] = quantiles(sizes)
        row["four_bits"] = quantiles(cheated)
        if base is not None:
            row["to_one"] = to_one(proof.records, proofs[base][1].records)
        if noise is not None:
            row["verdict"] = sequential_test(noise).update(sizes).verdict
            row["verdict_of_four_bits"] = sequential_test(noise).update(cheated).verdict


def to_one(records, others):
    """Return how far nonces are from those of one device; of chains, how many are the same."""
    if records[0].points is None:
        return quantiles(residuals(records, others))
    equal = [
        bool((mine.points == other.points).all())
        for mine, other in zip(records, others, strict=True)
    ]
    return {"same_chain": sum(equal), "nonces": len(equal)}


def quantiles(sizes):
    """Return the median and the largest."""
    return {
        "median": round_to(float(np.median(sizes)), 4),
        "largest": round_to(float(np.max(sizes)), 4),
    }


def main():
    options_parser = parser(__doc__)
    usual = [name for name in CASES if "tp 4" not in name]  # those that two devices run
    options_parser.add_argument("--cases", nargs="+", choices=CASES, default=usual, metavar="CASE")
    options_parser.add_argument("--model", default="shape:qwen3-4b")
    options_parser.add_argument("--dtype", default="bfloat16")
    options_parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options_parser.add_argument("--seq-len", type=int, default=256)
    options_parser.add_argument("--steps", type=int, default=64, help="steps of the chain")
    options_parser.add_argument("--nonces", type=int, default=128)
    options_parser.add_argument("--speed", type=int, default=1024, help="nonces of a turn")
    options_parser.add_argument(
        "--alone", action="store_true", help="one case after the other, with all memory"
    )
    options_parser.add_argument("--limit", type=float, default=900.0, help="seconds of all cases")
    options_parser.add_argument("--folder", type=Path, help="of checkpoints, proofs and logs")
    options_parser.add_argument("--child", help="the case that this process measures")
    chosen = options_parser.parse_args()
    if chosen.child:
        measured = Measured(chosen.child, chosen)
        try:
            measured.measure()
        except Exception as error:  # an engine that vLLM cannot start, or that dies
            measured.write(failed=f"{type(error).__name__}: {error}"[:500])
            raise
        return
    with tempfile.TemporaryDirectory() as folder:
        chosen.folder = chosen.folder or Path(folder)
        chosen.folder.mkdir(parents=True, exist_ok=True)
        make_checkpoints(chosen)
        note("checkpoints are made")
        run_cases(chosen)
        names = ("model", "dtype", "seq_len", "steps", "nonces", "speed")
        figures = {name: getattr(chosen, name) for name in names}
        rows = {name: read_row(name, chosen) for name in chosen.cases}
        for weights in dict.fromkeys(CASES[name].weights for name in chosen.cases):
            publish("vllm_divided", figures | {"cases": list(rows.values())}, chosen.output)
            judge(weights, rows, chosen)
        publish("vllm_divided", figures | {"cases": list(rows.values())}, chosen.output)


if __name__ == "__main__":
    main()
