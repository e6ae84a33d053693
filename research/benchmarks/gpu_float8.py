"""Proofs in float8 from honest engines of many kinds and from cheaters, for `float8_laws.py` to judge.

It writes proofs only, a folder for every engine, so that they can be judged anywhere, and against those of another
machine. The bundled models run in `float8` (a scale for a row) and `float8-block` (128 x 128), and a mixture of eight
experts with random weights in `float8`.

- Honest: the engine's own kernels in batches of 16, 32, 67 and 128; eager kernels, with torch's attention and with
  plain attention; a CPU, with fewer nonces.
- On a machine without a GPU (`--device cpu`) eager kernels in batches of 128 only.
- Cheats, on the engine's own kernels: weights of four bits, one scale for a whole matrix, products with short sums, the
  last eighth of the layers left out; in the mixture three of four experts, and the last layer left out.

A folder `calibrating` holds the block that laws come from; the other blocks are audited. Proofs that are already there
are kept. Every model may be a process of its own:

    python benchmarks/gpu_float8.py --models reference:qwen3 --proofs h200
    python benchmarks/float8_laws.py h200 h100 -o benchmarks/results/float8_laws.json
"""

import copy
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from _common import note, parser

from assay.models import Model, backbone, load_model
from assay.models.eight_bits import CUDA_BLOCK, FLOAT8, float8_blocks
from assay.poc import HFEngine, Round, prove
from assay.reports import provenance, write_atomic
from assay.research import cheats
from assay.research.redteam import make_experts

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.models.storing import in_eight_bits

MIXTURE = "mixture"
MODELS = ("reference:qwen3", "reference:llama", MIXTURE)
ARITHMETICS = {"float8": FLOAT8, "float8-block": float8_blocks(*CUDA_BLOCK)}
PRESETS = ("poc-2.0", "hardened")
CALIBRATING = "calibrating"
BATCHES = (128, 32, 16, 67)
SEQ_LEN = 256


@dataclass(frozen=True)
class Engine:
    """What proves: its name, and how many blocks and nonces it proves."""

    name: str
    engine: HFEngine
    blocks: tuple[str, ...]
    nonces: int
    presets: tuple[str, ...] = PRESETS


class Case:
    """One model in one format."""

    def __init__(self, plain, form, options):
        self.form, self.options = form, options
        self.plain, self.model = plain, rounded(plain, form)

    def engines(self):
        """All that prove, honest ones first, each made when it is asked for; on a CPU the first one alone."""
        audited = tuple(f"audited {index}" for index in range(self.options.blocks))
        every, nonces = (CALIBRATING, *audited), self.options.nonces
        for batch in BATCHES:
            blocks, presets = (every, PRESETS) if batch in BATCHES[:2] else ((CALIBRATING,), PRESETS[:1])
            yield Engine(f"own kernels, {batch}", self.own(self.model, batch), blocks, nonces, presets)
            if self.options.device == "cpu":
                return
        yield Engine("eager kernels", self.eager("sdpa"), every, nonces)
        yield Engine("plain attention", self.eager("eager"), every, nonces)
        if self.options.on_a_cpu and self.form == "float8" and self.plain.reference != MIXTURE:
            yield Engine("cpu", self.on_a_cpu(), every[:5], self.options.on_a_cpu, PRESETS[:1])
        for name, model in self.cheats():
            yield Engine(f"cheat: {name}", self.own(model, BATCHES[0]), audited[:1], nonces)

    def own(self, model, batch):
        """The engine's own kernels; on a CPU, which has none, eager ones."""
        return HFEngine(model, batch_size=batch, seq_len=SEQ_LEN, compiled=self.options.device == "cuda")

    def eager(self, attention):
        """Eager kernels with torch's attention (sdpa), or with plain attention (eager)."""
        module = copy.deepcopy(self.model.module)
        module.set_attn_implementation(attention)
        return HFEngine(replace(self.model, module=module), batch_size=64, seq_len=SEQ_LEN)

    def on_a_cpu(self):
        """Return an engine of the same model on a CPU."""
        plain = load_model(self.plain.reference, dtype="bfloat16", device="cpu")
        return HFEngine(rounded(plain, self.form), batch_size=32, seq_len=SEQ_LEN)

    def cheats(self):
        """Name and model of every cheat."""
        if self.plain.reference == MIXTURE:
            yield "three of four experts", cheats.with_fewer_experts(self.model, 3)
            yield "last layer", shortened(self.model, 1)
            return
        yield "four bits", rounded(cheats.rounded(self.plain, bits=4), self.form)
        if self.form == "float8":
            yield "one scale for a matrix", cheats.with_one_scale(self.model)
            yield "short sums", cheats.with_short_sums(self.model)
        yield "last eighth of the layers", shortened(self.model, -(-self.model.num_layers // 8))


def rounded(plain, form):
    """The model in a format of eight bits."""
    module = copy.deepcopy(plain.module)
    in_eight_bits(backbone(module), ARITHMETICS[form])
    return replace(plain, module=module, quantised=form)


def shortened(model, count):
    """The model without its last layers, as one that the engine's own kernels run."""
    short = cheats.without_last_layers(model, count)
    short.module.config.num_hidden_layers -= count
    return short


def plain_model(reference, device, folder):
    """The model in bfloat16."""
    path = make_experts(Path(folder)) if reference == MIXTURE else reference
    model = load_model(path, dtype="bfloat16", device=device)
    return replace(model, reference=reference)


def prove_all(engine: Engine, model: Model, folder: Path):
    """Write the proofs of an engine that are not there."""
    for preset in engine.presets:
        for block in engine.blocks:
            path = folder / block / f"{preset}.jsonl"
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            round = Round(block_hash=block, public_key="k", model=model.reference, preset=preset, seq_len=SEQ_LEN)
            prove(model, round, range(engine.nonces), engine=engine.engine, output=path)


def main():
    made = parser(__doc__)
    made.add_argument("--proofs", type=Path, required=True, help="folder for the proofs")
    made.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    made.add_argument("--formats", nargs="+", default=tuple(ARITHMETICS), choices=tuple(ARITHMETICS))
    made.add_argument("--device", default="cuda")
    made.add_argument("--blocks", type=int, default=16, help="blocks that are audited")
    made.add_argument("--nonces", type=int, default=512, help="nonces of a block")
    made.add_argument("--on-a-cpu", type=int, default=128, help="nonces of a block on a CPU; 0 proves none there")
    made.add_argument("--threads", type=int, default=8)
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    options.proofs.mkdir(parents=True, exist_ok=True)
    for reference in options.models:
        name = reference.rpartition(":")[2]
        write_atomic(options.proofs / f"{name}.json", json.dumps(provenance(), indent=2) + "\n")
        with tempfile.TemporaryDirectory() as folder:
            plain = plain_model(reference, options.device, folder)
        for form in options.formats[: 1 if reference == MIXTURE else None]:
            for engine in Case(plain, form, options).engines():
                note(f"{reference} in {form}: {engine.name}")
                prove_all(engine, engine.engine.model, options.proofs / name / form / engine.name)


if __name__ == "__main__":
    main()
