"""`prove` end to end on one CUDA device: against its floor, the compiled bare forward and the published way.

Everything runs in one process, on one batch shape (the published way, timed first, has its own 32), in bfloat16, with
random weights of the exact shape. The rest takes turns. Figures are medians of the rounds, in nonces per second.

- `published`: eager, inputs and transform of every nonce by themselves and in int64, one batch after the other.
- `eager`, `compiled`: the bare forward of transformers over inputs that exist already, all positions, no head;
  `compiled` is `torch.compile` of the whole decoder.
- `layers`: the lean decoder between its own kernels, all positions; `graph`: the same as one CUDA graph; `last`: the
  graph with the last layer for the last position only; `inductor`: as `last`, each layer compiled by Inductor instead,
  which no mixture is.
- `serial`: prove, one step after the other; `prove`: prove as it is. Both write a proof file.
- `float8 last`, `float8 prove`: the same in float8.

The floor is that of gpu_floor.py, on the same device right after. MFU is 2 x parameters without embeddings x positions
of the full forward over time, over PEAK: what a matrix product of this device reached (bfloat16, random data). The
roofline is the same with the operations that are left where the last layer serves the last position only.

    python benchmarks/gpu_prove.py --model shape:qwen3-0.6b -o benchmarks/results/gpu_prove_qwen3-0.6b.json
"""

import hashlib
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _common import note, parser, publish
from gpu_floor import measure_floor
from gpu_normals import published_normal
from streams_cpu import published_hash

from assay.models import load_model
from assay.models.decoder import backbone, decoder_layers
from assay.poc import HFEngine, Round, default_noise, prove
from assay.poc.engines.hf import compiled as _compiled
from assay.poc.engines.hf import engine as _hf
from assay.poc.engines.hf.compiled import CompiledForward
from assay.poc.engines.hf.lean import mixture_of
from assay.poc.engines.hf.memory import auto_batch
from assay.poc.engines.outputs import plain_outputs
from assay.poc.protocol.transforms import Transform
from assay.streams import seed32

PEAK = 764e12
PUBLISHED_BATCH = 32
PROOFS = ("serial", "prove", "float8 prove")
SEQ_LEN = 256


def event_seconds(function):
    """Time of one call on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def wall_seconds(function):
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Published:
    """The published implementation's arithmetic and loops, on the same model."""

    def __init__(self, model, round):
        self.model, self.round = model, round
        self.body = backbone(model.module)
        rows = published_normal(seed32(round.block_text("random_head")), model.hidden_size * 8192)
        self.head = rows.view(8192, -1) * 0.02

    def batch(self, nonces):
        """Distances of one batch."""
        width = self.model.hidden_size
        text = self.round.text
        inputs = [published_normal(seed32(text("inputs", n)), SEQ_LEN * width).view(SEQ_LEN, width) for n in nonces]
        embeds = torch.stack(inputs).to(self.model.dtype)
        positions = torch.arange(SEQ_LEN, device="cuda").expand(len(nonces), -1)
        states = self.body(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state[:, -1]
        target = published_normal(seed32(self.round.block_text("target")), 8192)
        target = target / target.norm()
        rows = [self._transformed(state.float(), nonce) for state, nonce in zip(states, nonces, strict=True)]
        logits = torch.stack(rows) @ self.head.T
        return (logits / logits.norm(dim=-1, keepdim=True) - target).norm(dim=-1).cpu().numpy()

    def _transformed(self, x, nonce):
        width = len(x)
        with torch.device("cuda"):
            uniform = published_hash(seed32(self.round.text("signs", nonce)), width).to(torch.float32) / 4294967296.0
        x = x * torch.where(uniform > 0.5, 1.0, -1.0)
        x = x / (x.norm() + 1e-8)
        for index in range(8):
            v = published_normal(seed32(self.round.text("reflection", nonce, index=index)), width)
            v = v / v.norm()
            x = x - 2 * (x @ v) * v
        return x


def used(model, name, parameter):
    """How many numbers of a parameter a position multiplies: of a mixture, those of the experts that it chooses."""
    config = model.module.config
    if "experts." not in name:
        return parameter.numel()
    return parameter.numel() * config.num_experts_per_tok // config.num_experts


def body_parameters(model):
    """Parameters that a position multiplies, without embeddings and head."""
    return sum(used(model, name, p) for name, p in backbone(model.module).named_parameters() if "embed" not in name)


def last_layer_share(model):
    """Share of the parameters whose products the last position alone needs."""
    layer = decoder_layers(model.module)[-1]
    kept = sum(part.weight.numel() for part in (layer.self_attn.k_proj, layer.self_attn.v_proj))
    return (sum(used(model, name, p) for name, p in layer.named_parameters()) - kept) / body_parameters(model)


def take_turns(timed, rounds):
    """Median seconds of each of several things, measured in turns."""
    times = {name: [] for name in timed}
    for _ in range(rounds):
        for name, measure in timed.items():
            times[name].append(measure())
    return {name: statistics.median(values) for name, values in times.items()}


def profile(model, engine, round, nonces):
    """Milliseconds of each part of a batch by itself, and how much of a proof the device was idle."""
    batch = list(nonces[: engine.batch_size])
    sizes = {"hidden_size": model.hidden_size, "vocab_size": model.vocab_size}
    transform = Transform(round, _pipeline(round), device=model.device, trained_head=engine.trained_head, **sizes)
    inputs = engine.inputs(round, batch)
    states = engine._run(inputs, None)
    values = transform(states, batch)
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    parts = {
        "inputs": lambda: engine.inputs(round, batch),
        "forward": lambda: engine._run(inputs, None),
        "transform": lambda: transform(states, batch),
        "copy": lambda: host.copy_(values, non_blocking=True),
    }
    medians = take_turns({name: lambda part=part: event_seconds(part) for name, part in parts.items()}, 5)
    rows = {f"{name}_ms": round_to(seconds * 1e3) for name, seconds in medians.items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        prove(model, round, nonces, engine=engine)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in seen.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    first, last = spans[0][0], max(end for _, end in spans)
    end, gaps = spans[0][1], 0.0
    for begin, stop in spans:
        gaps += max(0.0, begin - end)
        end = max(end, stop)
    return {**rows, "idle_share": round_to(gaps / (last - first))}


def _pipeline(round):
    from assay.poc import get_pipeline

    return get_pipeline(round.preset)


def round_to(value, digits=5):
    return float(f"{value:.{digits}g}")


def bits(proof):
    return [r.distance if r.vector is None else r.vector.tobytes() for r in proof.records]


def checks(model, engine, round, nonces):
    """Same bits in every place and again; and how far the compiled kernels are from eager ones."""
    size = engine.batch_size
    whole = prove(model, round, nonces[: 2 * size], engine=engine)
    again = prove(model, round, nonces[: 2 * size], engine=engine)
    moved = prove(model, round, nonces[5 : size + 5 : 3], engine=engine)
    eager = prove(model, round, nonces[: 2 * size], engine=HFEngine(model, batch_size=size, seq_len=SEQ_LEN))
    errors = np.subtract(whole.distances, eager.distances)
    return {
        "same_bits_again": bits(whole) == bits(again),
        "same_bits_in_any_place": bits(moved) == bits(whole)[5 : size + 5 : 3],
        "residual_against_eager_rms": round_to(np.sqrt(np.mean(errors**2))),
        "default_noise_sigma": round_to(default_noise("distance", "bfloat16", "bfloat16").size),  # of bfloat16
        "valid_rate": whole.valid_rate,
        "sha256_of_distances": hashlib.sha256(np.asarray(whole.distances).tobytes()).hexdigest(),
    }


def file_of(folder, name):
    return Path(folder) / f"{name}.jsonl"


def inductor_forward(model, batch):
    """The forward pass with layers that Inductor compiles."""
    fusible, _compiled.fusible = _compiled.fusible, lambda model: False
    try:
        return CompiledForward(model, batch, SEQ_LEN)
    finally:
        _compiled.fusible = fusible


def measure(reference, batch_size, seconds, rounds, skip_whole, sizes):
    model = load_model(reference, dtype="bfloat16", device="cuda")
    batch = batch_size or auto_batch(model, SEQ_LEN)
    round = Round(block_hash="bench", public_key="k", model=reference, seq_len=SEQ_LEN)
    started = {}
    published = Published(model, round)
    body = backbone(model.module)
    engine = HFEngine(model, batch_size=batch, seq_len=SEQ_LEN, compiled=True)
    inputs = engine.inputs(round, range(batch))

    def first(name, function):
        started[f"{name}_s"] = round_to(wall_seconds(function), 3)
        note(f"{reference} {name}: first call {started[f'{name}_s']} s")

    with torch.inference_mode():
        first("published", lambda: published.batch(range(PUBLISHED_BATCH)))
        published_s = statistics.median(
            wall_seconds(lambda: published.batch(range(PUBLISHED_BATCH))) for _ in range(max(3, rounds))
        )
        bare = {"eager": lambda: body(inputs_embeds=inputs, use_cache=False).last_hidden_state}
        layers = CompiledForward(model, batch, SEQ_LEN, graphs=False)
        graph = CompiledForward(model, batch, SEQ_LEN)
        rounded = load_model(reference, dtype="bfloat16", device="cuda", quantise="float8")
        float8 = HFEngine(rounded, batch_size=batch, seq_len=SEQ_LEN, compiled=True)
        if mixture_of(model) is None:
            inductor = inductor_forward(model, batch)
            bare["inductor"] = lambda: inductor.last_hidden(inputs)
        bare |= {
            "layers": lambda: layers.hidden(inputs),
            "graph": lambda: graph.hidden(inputs),
            "last": lambda: graph.last_hidden(inputs),
            "float8 last": lambda: float8._run(inputs, None),
        }
        if not skip_whole:
            whole = torch.compile(body, dynamic=False)
            bare["compiled"] = lambda: whole(inputs_embeds=inputs, use_cache=False).last_hidden_state
        for name, function in bare.items():
            first(name, function)
            function()
    first("prove_first_batch", lambda: prove(model, round, range(batch), engine=engine))
    one = event_seconds(lambda: engine._run(inputs, None))
    batches = max(4, int(seconds / one))
    nonces = range(batches * batch)
    repeats = max(2, int(seconds / 2 / one))

    def timed_bare(function):
        with torch.inference_mode():
            return event_seconds(lambda: [function() for _ in range(repeats)]) / repeats

    with tempfile.TemporaryDirectory() as folder:
        path = file_of(folder, "proof")

        def proved(model=model, engine=engine):
            return wall_seconds(lambda: prove(model, round, nonces, engine=engine, output=path, overwrite=True))

        def serial():
            overlapped, _hf.overlapped_outputs = _hf.overlapped_outputs, _serial
            try:
                return proved()
            finally:
                _hf.overlapped_outputs = overlapped

        timed = {name: lambda function=function: timed_bare(function) for name, function in bare.items()}
        timed |= {"serial": serial, "prove": proved, "float8 prove": lambda: proved(rounded, float8)}
        times = take_turns(timed, rounds)
    floors = measure_floor(model, rounded, batch, SEQ_LEN, seconds=seconds / 3, rounds=rounds)
    by_batch = {}
    for size in sizes:
        given = engine.inputs(round, range(size))
        with torch.inference_mode():
            graph = CompiledForward(model, size, SEQ_LEN)
            graph.last_hidden(given)
        by_batch[size] = round_to(size / timed_bare(lambda graph=graph, given=given: graph.last_hidden(given)))
        note(f"{reference} batch {size}: {by_batch[size]} nonces/s")
    rates = {"published": PUBLISHED_BATCH / published_s}
    rates |= {name: (len(nonces) if name in PROOFS else batch) / times[name] for name in times}
    best = {kind: floors[kind]["prove"]["floor_nonces_per_second"] for kind in floors}
    note(f"{reference}: {rates}")
    flops = 2 * body_parameters(model) * SEQ_LEN
    left = 1 - last_layer_share(model) * (1 - 1 / SEQ_LEN)
    return {
        "model": reference,
        "batch_size": batch,
        "seq_len": SEQ_LEN,
        "fingerprint": engine.fingerprint.as_dict(),
        "batches": batches,
        "nonces_per_second": {name: round_to(rate) for name, rate in rates.items()},
        "last_by_batch_size": by_batch,
        "mfu": {name: round_to(rate * flops / PEAK, 4) for name, rate in rates.items()},
        "roofline_nonces_per_second": round_to(PEAK / (flops * left)),
        "share_of_roofline": round_to(rates["prove"] * flops * left / PEAK, 4),
        "floor": floors,
        "share_of_floor": {
            "bfloat16": round_to(rates["prove"] / best["bfloat16"], 4),
            "float8": round_to(rates["float8 prove"] / best["float8"], 4),
        },
        "float8_over_bfloat16": round_to(rates["float8 prove"] / rates["prove"], 4),
        "last_over_inductor": round_to(rates["last"] / rates["inductor"], 4) if "inductor" in rates else None,
        "prove_over_compiled": round_to(rates["prove"] / rates["compiled"], 4) if "compiled" in rates else None,
        "prove_over_published": round_to(rates["prove"] / rates["published"], 4),
        "first_calls": started,
        "profile": profile(model, engine, round, nonces[: 6 * batch]),
        "checks": checks(model, engine, replace(round, block_hash="checks"), nonces),
        "float8": {
            "fingerprint": float8.fingerprint.as_dict(),
            "profile": profile(rounded, float8, round, nonces[: 6 * batch]),
            "checks": checks(rounded, float8, replace(round, block_hash="checks"), nonces),
        },
        "peak_gib": round_to(torch.cuda.max_memory_allocated() / 2**30, 4),
    }


def _serial(engine, run, round, pipeline, nonces):
    return plain_outputs(engine, round, pipeline, nonces)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="shape:qwen3-0.6b")
    arguments.add_argument("--batch-size", type=int, default=0, help="0 takes what prove takes by itself")
    arguments.add_argument("--seconds", type=float, default=3.0, help="of every timing")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument(
        "--skip-whole", action="store_true", help="leave out the slow compilation of the whole decoder"
    )
    arguments.add_argument("--sizes", type=int, nargs="*", default=[], help="other batch sizes for the bare forward")
    options = arguments.parse_args()
    figures = measure(
        options.model, options.batch_size, options.seconds, options.rounds, options.skip_whole, options.sizes
    )
    publish("gpu_prove", figures, options.output)


if __name__ == "__main__":
    main()
