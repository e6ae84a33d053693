"""vLLM on two or four devices beside transformers: tensor and pipeline parallel, two engines, experts dealt out.

Every case proves the same nonces as transformers does with the same checkpoint in the same dtype. On one round the
noise between the two is calibrated; that law is pinned, and with it each judges the other on another round. A cheat
under the honest name is judged likewise. On transformers that is four bits, three where four are the honest format, or
half of the experts of a mixture; in the cases `…-int4` and `…-stale` it is an engine that serves four bits, or the
checkpoint before it was fine-tuned. The cases `…, FORMAT` serve the checkpoint in one of the formats of
`tests/models/storing.py`. Along both ways through vLLM,
whole batches and requests, the values are compared with each other. At the end one validator with one `pins.toml`, in
which every build has its law, judges all proofs of the dense model again.

A case runs in processes of its own, and ends at `--limit` seconds; what it has shown until then stays. Its row is
written at once. A second run with the same folder measures only what has no row; `--again` measures anew.

    . .vllm/setup.sh; export PYTHONPATH=$PWD/src:$PYTHONPATH
    python3 benchmarks/vllm_parallel.py --cases dense -o benchmarks/results/vllm_parallel_h200x2.json

Several runs, each with a folder of its own, may share the devices if they say how much memory a cache takes:

    python3 benchmarks/vllm_parallel.py --cases formats-tp2 --folder build/formats \
        --options '{"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2147483648}' -o OUT

A run that shows on a CPU with two cores that everything works:

    .venv-vllm/bin/python benchmarks/vllm_parallel.py --device cpu --model reference:qwen3 --seq-len 64 --nonces 64 \
        --limit 600 -o benchmarks/results/vllm_parallel_cpu.json

The case of Ray, which runs if it is named, starts two nodes of it, and needs it beside the environment (`_vllm_ray`):

    .venv-vllm/bin/python benchmarks/vllm_parallel.py --device cpu --model reference:qwen3 --seq-len 64 --nonces 64 \
        --limit 600 --cases tp2-ray -o benchmarks/results/vllm_parallel_ray_cpu.json

So do the cases for four devices, of which a CPU runs those without stages:

    .venv-vllm/bin/python benchmarks/vllm_parallel.py --device cpu --model reference:qwen3 --seq-len 64 --nonces 256 \
        --limit 1500 --cases tp4 -o benchmarks/results/vllm_parallel_four_cpu.json
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
from _common import note, parser, publish
from _vllm_cases import CASES, GROUPS
from _vllm_gathers import with_gathers
from _vllm_ray import Nodes
from vllm_support import allow, published, verdict

from assay import poc
from assay.errors import AssayError, UsageError
from assay.models import checkpoint_directory, load_model, save_random
from assay.poc.engines.hf import HFEngine
from assay.poc.verdict import pinned_calibration
from assay.reports import read_json, write_atomic
from assay.research.cheats import adapted, rounded, with_fewer_experts
from tests.models.storing import FOUR_BITS, make_mixture, store

PRESETS = ("poc-2.0", "hardened")
PATHS = {"direct": "auto", "requests": "requests"}
SPARE = 64  # positions of an engine and of the mixture beyond those of a nonce
FALSE_WEIGHTS = {"int4": rounded, "stale": adapted}
GROUP = 128  # rows and columns, or columns of four bits, that share a scale, as in most published checkpoints


def main():
    made = parser(__doc__)
    usual = [name for group, names in GROUPS.items() if group != "four" for name in names]
    known = [*CASES, *GROUPS]
    made.add_argument(
        "--cases", nargs="+", choices=known, default=usual, metavar="CASE", help="cases or groups of them"
    )
    made.add_argument("--unproven", action="store_true", help="run what is refused because it was not run there")
    made.add_argument("--again", action="store_true", help="measure cases that have a row, too")
    made.add_argument("--model", default="shape:qwen3-0.6b")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    made.add_argument("--seq-len", type=int, default=256)
    made.add_argument("--nonces", type=int, default=256)
    made.add_argument("--options", type=json.loads, default={}, help="engine arguments of vLLM for all cases, as JSON")
    made.add_argument("--limit", type=float, default=150.0, help="seconds of a case")
    made.add_argument("--total", type=float, default=float("inf"), help="seconds of the run; no case begins after it")
    made.add_argument("--folder", type=Path, default=Path("build/vllm_parallel"), help="checkpoints, laws, rows, logs")
    made.add_argument("--child", help="name of the case that this process measures, and its rank")
    arguments = made.parse_args()
    arguments.cases = [name for word in arguments.cases for name in GROUPS.get(word, [word])]
    if arguments.child:
        measure_here(arguments)
        return
    began = time.monotonic()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    make_checkpoints(arguments)
    for name in arguments.cases:
        left = min(arguments.limit, arguments.total - (time.monotonic() - began))
        if left <= 0:
            note(f"{name}: not begun, the time is over")
            break
        if arguments.again or not row_path(arguments, name).exists():
            row = run(name, arguments, left)
            write(row_path(arguments, name), row)
            note(f"{name}: {row}")
        rows = [read_json(path) for path in (row_path(arguments, case) for case in CASES) if path.exists()]
        figures = {name: getattr(arguments, name) for name in ("model", "dtype", "seq_len", "nonces", "options")}
        with contextlib.redirect_stdout(io.StringIO()):
            publish("vllm_parallel", figures | {"cases": rows}, arguments.output)


def row_path(arguments, name):
    """Return the file of the row of a case."""
    return arguments.folder / f"{filed(name)}.row.json"


def filed(name):
    """Return the name of a case as files have it."""
    return name.replace(",", "").replace(" ", "-")


def law_path(arguments, name, preset):
    """Return the file of the pinned law of a case."""
    return arguments.folder / f"{filed(name)}-{preset}.law.json"


def proof_path(arguments, name, preset):
    """Return the file of the proof of a case."""
    return arguments.folder / f"{filed(name)}-{preset}.jsonl"


def write(path, row):
    """Write a row in one piece."""
    write_atomic(path, json.dumps(row) + "\n")


def make_checkpoints(arguments):
    """Make every checkpoint that the cases need and that is not there yet."""
    began, source = time.monotonic(), arguments.folder / "honest"
    cases = [CASES[name] for name in arguments.cases]
    if not source.exists():
        if arguments.model.startswith("shape:"):
            save_random(arguments.model, source, weights="random-all", dtype=arguments.dtype)
        else:
            source.symlink_to(checkpoint_directory(arguments.model))
    for name, change in FALSE_WEIGHTS.items():
        if any(case.weights == name for case in cases) and not (arguments.folder / name).exists():
            model = load_model(source, dtype=arguments.dtype, device="cpu")
            change(model).module.save_pretrained(arguments.folder / name)
    if any(case.mixture for case in cases) and not (arguments.folder / "mixture").exists():
        # GPUs have no kernels for heads of 32, and half of an expert is to have whole groups.
        sizes = {"head_dim": GROUP, "moe_intermediate_size": 2 * GROUP, "num_key_value_heads": 4}
        sizes |= {"hidden_size": 2 * GROUP, "max_position_embeddings": arguments.seq_len + SPARE}
        make_mixture("qwen3-moe", arguments.folder / "mixture", **sizes)
    for case in cases:
        if case.stored and not (arguments.folder / case.checkpoint).exists():
            whole = arguments.folder / replace(case, stored="").checkpoint
            store(whole, arguments.folder / case.checkpoint, case.stored, block=GROUP)
    note(f"checkpoints after {time.monotonic() - began:.0f} s")


def run(name, arguments, limit):
    """Run a case in processes of its own; return its row, whatever happens to them."""
    case, began = CASES[name], time.monotonic()
    names = [f"{name}:{rank}" for rank in range(case.engines)]
    for child in names:
        row_path(arguments, child).unlink(missing_ok=True)
    needed = with_gathers(arguments.folder / "gathers") if arguments.device == "cpu" and case.steps_together else {}
    with Nodes() if case.ray else contextlib.nullcontext() as nodes:
        processes = [start(child, arguments, nodes.environment if nodes else needed) for child in names]
        deadline = began + limit
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.2)
        rows = [finished(child, process, arguments) for child, process in zip(names, processes, strict=True)]
    row = {"name": name, "seconds": round(time.monotonic() - began, 1)}
    return row | (rows[0] if len(rows) == 1 else {"engines": rows})


def start(child, arguments, needed):
    """Start the process that measures a case, or one engine of it, with what it needs in its environment."""
    name, _, rank = child.rpartition(":")
    case, environment = CASES[name], dict(os.environ)
    if arguments.device == "cuda" and case.engines > 1:
        environment["CUDA_VISIBLE_DEVICES"] = rank
    if arguments.device == "cpu":  # one core each, as the CPU build of vLLM wants to be told
        single = rank if case.engines > 1 else "nobind"
        bound = {1: single, 2: "0|1"}  # more workers than cores share them
        environment["VLLM_CPU_OMP_THREADS_BIND"] = bound.get(case.devices, "nobind")
    # It uses NVLink multicast, and a program that is killed in it can spoil the devices for other users of a host.
    environment.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    words = [sys.executable, __file__, *sys.argv[1:], "--child", child]
    environment |= needed
    with log_path(arguments, child).open("wb") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)


def log_path(arguments, child):
    """Return the log of a process."""
    return arguments.folder / f"{filed(child)}.log"


def finished(child, process, arguments):
    """End a process and its children if they run; return what it has shown, and how it failed if it did."""
    late = process.poll() is None
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        tree = [*parent.children(recursive=True), parent]
        for one in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(tree, timeout=20)
    process.wait()
    path = row_path(arguments, child)
    row = read_json(path) if path.exists() else {}
    if late:
        row["failed"] = "did not end within its limit"
    elif process.returncode and "failed" not in row:
        row["failed"] = f"ended with code {process.returncode}"
    if "failed" in row:
        row["errors"] = errors(log_path(arguments, child).read_text(errors="replace"))
    return row


def errors(log):
    """Return the first and the last errors that a log names, without the folders of this machine."""
    named = r"Segfault encountered|\b[\w.]*(?:Error|Exception)\b: .*"
    found = re.findall(named, re.sub(r"\x1b\[[0-9;]*m", "", log))
    known = list(dict.fromkeys(re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", line)[:300] for line in found))
    return known[:3] + known[3:][-2:]


def measure_here(arguments):
    """Measure a case in this process, and write its row after every preset."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    name, _, rank = arguments.child.rpartition(":")
    row = {}
    if arguments.unproven:
        allow(arguments.device)
    try:
        for figures in judged(arguments) if CASES[name].validator else measure(name, int(rank), arguments):
            row |= figures
            write(row_path(arguments, arguments.child), row)
    except UsageError as error:
        write(row_path(arguments, arguments.child), row | {"refused": str(error)})
    except AssayError as error:
        write(row_path(arguments, arguments.child), row | {"failed": error.seen})


def measure(name, rank, arguments):
    """Yield the figures of one engine, as they are found."""
    from assay.poc.engines.vllm import VLLMEngine

    case, began = CASES[name], time.monotonic()
    options = {"enforce_eager": not case.compiled, "max_model_len": arguments.seq_len + SPARE} | case.options
    options |= {"gpu_memory_utilization": 0.3} if arguments.device == "cuda" else {"max_num_seqs": 16}
    options |= arguments.options
    own = arguments.folder / case.checkpoint
    served = own if case.weights == "honest" else arguments.folder / case.weights
    dtype = "float16" if case.stored == "awq" else arguments.dtype
    shape = {"batch_size": 32, "seq_len": arguments.seq_len, "dtype": dtype}
    nonces = range(rank, arguments.nonces * case.engines, case.engines)
    with VLLMEngine(str(served), **shape, **options) as engine:
        yield {"start_seconds": round(time.monotonic() - began, 1), "fingerprint": engine.fingerprint.as_dict()}
        model = load_model(own, dtype=dtype, device=arguments.device)
        presets = {}
        for preset in PRESETS:
            compared = Comparison(name, preset, nonces, engine, model, arguments)
            presets[preset] = compared.honest() if case.weights == "honest" else compared.cheating()
            yield {"presets": presets}
        yield {"held": engine.counts()}


def judged(arguments):
    """Yield the verdicts of one validator whose pins have a law for every build of the dense model."""
    whole = {name: case for name, case in CASES.items() if case.checkpoint == "honest" and not case.validator}
    honest = [name for name, case in whole.items() if not case.law]
    false = [name for name, case in whole.items() if case.weights != "honest" and case.engines == 1]
    model = load_model(arguments.folder / "honest", dtype=arguments.dtype, device=arguments.device)
    found = {}
    for preset in PRESETS:
        proofs = {name: proof_path(arguments, name, preset) for name in honest + false}
        known = [name for name in honest if proofs[name].exists()]
        pins = arguments.folder / f"{preset}.toml"
        words = ["--model", str(arguments.folder / "honest"), "--public-key", "k", "-o", str(pins), "--overwrite"]
        for name in known:
            words += ["--from-proof", str(proofs[name]), "--calibration", str(law_path(arguments, name, preset))]
        subprocess.run([sys.executable, "-m", "assay", "poc", "pins", "new", *words], check=True)
        network, found[preset] = poc.NetworkPins.load(pins), {}
        for name, path in proofs.items():
            if path.exists():
                proof = poc.Proof.load(path)
                judge = {"expect": network.for_round(block_hash="fresh", public_key="k"), "seed": 1}
                judge |= {"calibration": pinned_calibration(network, proof.header), "sample": arguments.nonces}
                found[preset][name] = verdict(proof, model, **judge)
        yield {"verdicts": found}


class Comparison:
    """One preset of one engine beside transformers."""

    def __init__(self, name, preset, nonces, engine, model, arguments):
        self.case, self.preset, self.nonces = CASES[name], preset, nonces
        self.engine, self.model, self.arguments = engine, model, arguments
        self.name, self.law = name, self.case.law or name

    def honest(self):
        """Return residuals, the ways through vLLM beside each other, and the verdicts by the pinned law."""
        row = {}
        if not self.case.law:
            ours, theirs = self.inside("calibrated"), self.beside(self.model, "calibrated")
            told = {"hidden_size": self.model.hidden_size, "mixture": self.case.mixture}
            calibration = poc.calibrate(ours, theirs, **told)  # as `assay poc calibrate --model` is told
            calibration.save(law_path(self.arguments, self.name, self.preset))
            row["law"] = str(calibration.builds[0].noise.law)
        ways = {way: self.inside("fresh", way) for way in reversed(PATHS)}
        row["beside_the_scheduler"] = self.engine._client.direct.describe()
        if not self.case.law:
            ways["direct"].save(proof_path(self.arguments, self.name, self.preset), overwrite=True)
        other, false = self.beside(self.model, "fresh"), self.beside(self.cheat(), "fresh")
        stated = replace(false.header, digest=other.header.digest, fingerprint=other.header.fingerprint)
        false = poc.Proof.build(stated, false.records, false.footer.seconds)
        row |= apart("residual", ways["direct"], other) | apart("cheat", false, other)
        row |= apart("direct_from_requests", *ways.values())
        for way, proof in ways.items():
            row[f"vllm_{way}_on_transformers"] = verdict(proof, self.model, **self.judge())
        back = {"engine": self.engine} | self.judge()
        row["transformers_on_vllm"] = verdict(other, self.engine.model, **back)
        row["cheat_on_vllm"] = verdict(false, self.engine.model, **back)
        return row

    def cheating(self):
        """Return how far an engine with other weights is off, and the verdict when it states the honest checkpoint."""
        proof, other = self.inside("fresh"), self.beside(self.model, "fresh")
        false = poc.Proof.build(replace(proof.header, digest=self.model.digest), proof.records, proof.footer.seconds)
        false.save(proof_path(self.arguments, self.name, self.preset), overwrite=True)
        found = {"verdict_on_transformers": verdict(false, self.model, **self.judge())}
        found["verdict_under_its_own_name"] = verdict(proof, self.model, **self.judge()).splitlines()[0]
        return apart("residual", false, other) | found

    def cheat(self):
        """Return the cheaper model on transformers."""
        if self.case.mixture:
            return with_fewer_experts(self.model, self.model.module.config.num_experts_per_tok // 2)
        if self.case.stored in FOUR_BITS:
            return rounded(self.model, 3)
        if self.case.stored:  # what is in eight bits is not rounded again
            source, device = self.arguments.folder / "honest", str(self.model.device)
            whole = load_model(source, dtype=self.arguments.dtype, device=device)
            return replace(rounded(whole), digest=self.model.digest)
        return rounded(self.model)

    def judge(self):
        """Return the options of a verdict: all nonces, and the law that was pinned before."""
        calibration = poc.Calibration.load(law_path(self.arguments, self.law, self.preset))
        return {"sample": len(self.nonces), "seed": 1, "calibration": calibration}

    def round(self, block):
        """Return a round."""
        length = self.engine.seq_len
        return poc.Round(block_hash=block, public_key="k", seq_len=length, preset=self.preset, model="m", strength=256)

    def inside(self, block, way="direct"):
        """Prove in vLLM along one way."""
        throttle = self.engine._client.throttle
        throttle.settings = replace(throttle.settings, path=PATHS[way])
        proof = poc.prove(self.engine.model, self.round(block), self.nonces, engine=self.engine)
        throttle.settings = replace(throttle.settings, path="auto")
        return proof

    def beside(self, model, block):
        """Prove on transformers."""
        engine = HFEngine(model, batch_size=32, seq_len=self.engine.seq_len)
        return poc.prove(model, self.round(block), self.nonces, engine=engine)


def apart(name, one, other):
    """Return how far two proofs are from each other: median, largest, and how many values are the same bits."""
    difference = np.abs(published(one) - published(other))
    return {
        f"{name}_median": float(np.median(difference)),
        f"{name}_max": float(difference.max()),
        f"{name}_same": int((difference == 0).sum()),
        f"{name}_values": int(difference.size),
    }


if __name__ == "__main__":
    main()
