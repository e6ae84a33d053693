"""`prove` end to end on one CUDA device: against its floor, the compiled bare forward and the
published way.

Everything runs in one process, on one batch shape (the published way, timed first, has its own 32),
with random weights of the exact shape. The rest takes turns. Figures are medians of the rounds, in
nonces per second.

- `published`: eager, inputs and transform of every nonce by themselves and in int64, one batch
  after the other.
- `eager`, `compiled`: the bare forward of transformers over inputs that exist already, all
  positions, no head; `compiled` is `torch.compile` of the whole decoder.
- `prove FORMAT`: `prove` as it is, which writes a proof file, in bfloat16 and in each format of
  eight bits; weights of `float8-block` have a scale for every 128 x 128 numbers, those of `float8`
  and `int8-rows` one for a row.

The floor is that of gpu_floor.py, on the same device right after. MFU is 2 x parameters without
embeddings x positions of the full forward over time, over PEAK: what a matrix product of this
device reached (bfloat16, random data). `checks` says whether a nonce has the same bits in any place
of a batch and again, and how far they are from eager kernels.

    python research/benchmarks/gpu_prove.py --model shape:qwen3-0.6b \
      -o research/results/gpu_prove_qwen3-0.6b.json
"""

import copy
import hashlib
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _common import event_seconds, note, parser, publish, round_to, take_turns, wall_seconds
from gpu_floor import measure_floor
from streams import published_hash, published_normal

from assay.models import load_model
from assay.models.decoder import backbone
from assay.models.eight_bits import CUDA_BLOCK, FLOAT8, INT8, float8_blocks
from assay.poc import HFEngine, Round, bundled_noise, prove
from assay.poc.engines.hf.shapes import auto_batch
from assay.streams import seed32
from tests.models.storing import in_eight_bits

PEAK = 764e12
PUBLISHED_BATCH = 32
SEQ_LEN = 256
QWEN3 = "4fe788470005f674c3b7a43790593d0a873a83b6fbabad16e403361d09a5b6fb"
FORMATS = {by.name: by for by in (FLOAT8, float8_blocks(*CUDA_BLOCK), INT8)}


class Published:
    """The published implementation's arithmetic and loops, on the same model."""

    def __init__(self, model, round):
        self.model = model
        self.round = round
        self.body = backbone(model.module)
        rows = published_normal(
            seed32(round.block_text("random_head")), model.hidden_size * 8192, "cuda"
        )
        self.head = rows.view(8192, -1) * 0.02

    def batch(self, nonces):
        """Distances of one batch."""
        width = self.model.hidden_size
        text = self.round.text
        inputs = [
            published_normal(seed32(text("inputs", n)), SEQ_LEN * width, "cuda") for n in nonces
        ]
        embeds = torch.stack(inputs).view(len(nonces), SEQ_LEN, width).to(self.model.dtype)
        positions = torch.arange(SEQ_LEN, device="cuda").expand(len(nonces), -1)
        states = self.body(
            inputs_embeds=embeds, position_ids=positions, use_cache=False
        ).last_hidden_state[:, -1]
        target = published_normal(seed32(self.round.block_text("target")), 8192, "cuda")
        target = target / target.norm()
        rows = [
            self._transformed(state.float(), nonce)
            for state, nonce in zip(states, nonces, strict=True)
        ]
        logits = torch.stack(rows) @ self.head.T
        return (logits / logits.norm(dim=-1, keepdim=True) - target).norm(dim=-1).cpu().numpy()

    def _transformed(self, x, nonce):
        width = len(x)
        uniform = (
            published_hash(seed32(self.round.text("signs", nonce)), width, "cuda").float()
            / 4294967296.0
        )
        x = x * torch.where(uniform > 0.5, 1.0, -1.0)
        x = x / (x.norm() + 1e-8)
        for index in range(8):
            v = published_normal(
                seed32(self.round.text("reflection", nonce, index=index)), width, "cuda"
            )
            v = v / v.norm()
            x = x - 2 * (x @ v) * v
        return x


def models_of(reference, formats, layers):
    """The model in bfloat16 and in other formats, with its first layers only where their number is
    given.
    """
    plain = load_model(reference, dtype="bfloat16", device="cuda")
    if layers:
        plain.module.config.num_hidden_layers = layers
        del backbone(plain.module).layers[layers:]
    models = {"bfloat16": plain}
    for name in formats:
        module = copy.deepcopy(plain.module)
        in_eight_bits(backbone(module), FORMATS[name])
        models[name] = replace(plain, module=module, quantised=name)
    return models


def body_parameters(model):
    """Parameters that a position multiplies, without embeddings and head: of a mixture, those of
    its experts.
    """
    config = model.module.config
    count = 0
    for name, parameter in backbone(model.module).named_parameters():
        if "experts." in name:
            count += parameter.numel() * config.num_experts_per_tok // config.num_experts
        elif "embed" not in name:
            count += parameter.numel()
    return count


def bits(proof):
    return [r.distance if r.vector is None else r.vector.tobytes() for r in proof.records]


def checks(model, engine, round, nonces):
    """Same bits in every place and again; and how far the engine's kernels are from eager ones."""
    size = engine.batch_size
    complete, again = (prove(model, round, nonces[: 2 * size], engine=engine) for _ in range(2))
    moved = prove(model, round, nonces[5 : size + 5 : 3], engine=engine)
    eager = prove(
        model, round, nonces[: 2 * size], engine=HFEngine(model, batch_size=size, seq_len=SEQ_LEN)
    )
    errors = np.subtract(complete.distances, eager.distances)
    return {
        "fingerprint": engine.fingerprint.as_dict(),
        "same_bits_again": bits(complete) == bits(again),
        "same_bits_in_any_place": bits(moved) == bits(complete)[5 : size + 5 : 3],
        "residual_against_eager_rms": round_to(np.sqrt(np.mean(errors**2))),
        "default_noise_sigma": round_to(
            bundled_noise(QWEN3, "distance", "bfloat16", "bfloat16").size
        ),  # of bfloat16
        "valid_rate": complete.valid_rate,
        "sha256_of_distances": hashlib.sha256(np.asarray(complete.distances).tobytes()).hexdigest(),
    }


def measure(options):
    reference = options.model
    rounds = options.rounds
    models = models_of(reference, options.formats, options.layers)
    model = models["bfloat16"]
    batch = options.batch_size or auto_batch(model, SEQ_LEN)
    round = Round(
        block_hash="bench", public_key="k", model=reference, seq_len=SEQ_LEN, preset=options.preset
    )
    engines = {
        name: HFEngine(made, batch_size=batch, seq_len=SEQ_LEN, compiled=True)
        for name, made in models.items()
    }
    started = {}
    body = backbone(model.module)
    inputs = engines["bfloat16"].embeddings(round.inputs(range(batch)))
    bare = {"eager": body}
    if not options.skip_whole:
        bare["compiled"] = torch.compile(body, dynamic=False)

    def forward(name):
        with torch.inference_mode():
            return bare[name](inputs_embeds=inputs, use_cache=False).last_hidden_state

    published = Published(model, round)
    with torch.inference_mode():
        seconds = [
            wall_seconds(lambda: published.batch(range(PUBLISHED_BATCH)))
            for _ in range(1 + max(3, rounds))
        ]
    published_rate = PUBLISHED_BATCH / statistics.median(seconds[1:])
    for name in bare:
        started[name] = round_to(wall_seconds(lambda name=name: forward(name)), 3)
    for name, made in models.items():
        first = wall_seconds(
            lambda name=name, made=made: prove(made, round, range(batch), engine=engines[name])
        )
        started[f"prove {name}"] = round_to(first, 3)
    note(f"{reference}: first calls {started}")
    eager_seconds = event_seconds(lambda: forward("eager"))
    nonces = range(batch * max(4, int(options.seconds / eager_seconds)))
    repeats = max(2, int(options.seconds / 2 / eager_seconds))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "proof.jsonl"

        def proved(name):
            chosen = {"engine": engines[name], "output": path, "overwrite": True}
            return wall_seconds(lambda: prove(models[name], round, nonces, **chosen)) / (
                len(nonces) // batch
            )

        timed = {
            name: lambda name=name: event_seconds(lambda: forward(name), repeats) for name in bare
        }
        timed |= {f"prove {name}": lambda name=name: proved(name) for name in models}
        times = take_turns(timed, rounds)
    rates = {"published": published_rate} | {name: batch / times[name] for name in times}
    note(f"{reference}: {rates}")
    rounded = models.get("float8")
    floors = measure_floor(
        model, rounded, batch, SEQ_LEN, seconds=options.seconds / 3, rounds=rounds
    )
    flops = 2 * body_parameters(model) * SEQ_LEN
    mine = rates["prove bfloat16"]
    over = {
        name: round_to(mine / rate, 4) for name, rate in rates.items() if name != "prove bfloat16"
    }
    return {
        "model": reference,
        "preset": options.preset,
        "layers": model.num_layers,
        "batch_size": batch,
        "seq_len": SEQ_LEN,
        "batches": len(nonces) // batch,
        "nonces_per_second": {name: round_to(rate) for name, rate in rates.items()},
        "mfu": {name: round_to(rate * flops / PEAK, 4) for name, rate in rates.items()},
        "floor": floors,
        "share_of_floor": {
            name: round_to(rates[f"prove {name}"] / floor["prove"]["floor_nonces_per_second"], 4)
            for name, floor in floors.items()
        },
        "prove_over_compiled": over.get("compiled"),
        "prove_over_published": over["published"],
        "formats_over_bfloat16": {
            name: round_to(1 / over[f"prove {name}"], 4) for name in options.formats
        },
        "first_calls_seconds": started,
        "checks": {
            name: checks(made, engines[name], replace(round, block_hash="checks"), nonces)
            for name, made in models.items()
        },
        "peak_gib": round_to(torch.cuda.max_memory_allocated() / 2**30, 4),
    }


def main():
    options_parser = parser(__doc__)
    options_parser.add_argument("--model", default="shape:qwen3-0.6b")
    options_parser.add_argument(
        "--formats", nargs="*", choices=FORMATS, default=["float8"], help="beside bfloat16"
    )
    options_parser.add_argument("--preset", default="poc-2.0")
    options_parser.add_argument(
        "--batch-size", type=int, default=0, help="0 takes what prove takes by itself"
    )
    options_parser.add_argument("--seconds", type=float, default=3.0, help="of every timing")
    options_parser.add_argument("--rounds", type=int, default=3)
    options_parser.add_argument(
        "--layers", type=int, default=0, help="take that many of the first layers; 0 takes all"
    )
    options_parser.add_argument(
        "--skip-whole",
        action="store_true",
        help="leave out the slow compilation of the whole decoder",
    )
    options = options_parser.parse_args()
    publish("gpu_prove", measure(options), options.output)


if __name__ == "__main__":
    main()
