"""Power and false accusations of the chain's decode proof, beside `artifact`, `tokens-1` and our
`decode`, in the same run.

Null: a validator recomputes an honest node in another number format, batch shape or attention, and
    differs by rounding alone.
Cheats are programs: rounded weights, weights of another step, a layer left out, a chain that ends
    early, a prompt that is left out or taken from another nonce, points that are drawn.
Statistic: the residual of a nonce, as assay has it. Bytes are those that a validator must read for
    a test of its mean with one false accusation in a thousand honest nodes and a power of 90 %, as
    two normal laws give them: n = ((3.090 s0 + 1.282 s1)/(m1 - m0))² nonces. Intervals are the
    middle 95 % of 1000 resamplings of nonces. Pass rule: none, this is a comparison.
The rule of the network stands beside it: the largest margin of a nonce against a threshold.

    python research/benchmarks/chain_decode.py --model reference:qwen3 \
      -o research/results/chain_decode_qwen3.json
"""

import copy
from dataclasses import replace

import numpy as np
import torch
from _common import note, parser, publish, round_to
from assay_research.model_cheats import adapted, rounded_fp8
from tokens import finetuned, without_layers

from assay.models import load_model
from assay.poc import HFEngine, Round, cheats, get_pipeline, measure_frame, prove
from assay.poc.protocol.records import packed_size
from assay.poc.prover import compute
from assay.poc.verdict.residuals import residuals

THRESHOLDS = (0.025, 0.05, 0.4)  # of the network: two that are named for models, and its default
RESAMPLED = 1000
FALSE = 3.090  # quantiles of the normal law: one in a thousand, and nine in ten
POWER = 1.282
VALIDATORS = ("bfloat16", "float32", "float16", "batches of 4", "eager attention")


class Side:
    """A node or a validator: a model in a format, with a batch size."""

    def __init__(self, model, batch_size):
        self.model = model
        self.batch_size = batch_size

    def engine(self, seq_len):
        """Return its engine for prompts of a length."""
        return HFEngine(self.model, batch_size=self.batch_size, seq_len=seq_len)


def with_attention(model, name):
    """Return the model with another implementation of attention."""
    module = copy.deepcopy(model.module)
    module.set_attn_implementation(name)
    return replace(model, module=module)


class OtherPrompt(HFEngine):
    """An engine that fills the cache of every nonce from one prompt, or leaves half of it out."""

    def __init__(self, model, *, half, **shape):
        super().__init__(model, **shape)
        self._half = half

    def draws(self, inputs, pipeline):
        """Return the chain behind the other prompt."""
        draws = super().draws(inputs, pipeline)
        prompts_RPD = draws.prompts
        if self._half:
            draws.prompts = prompts_RPD[:, prompts_RPD.shape[1] // 2 :]
        else:
            draws.prompts = prompts_RPD[:1].expand_as(prompts_RPD).contiguous()
        return draws


def ended_early(proof, share):
    """Return the proof with the points from a share of the chain on drawn at random."""
    rng = np.random.default_rng(7)
    records = []
    for record in proof.records:
        points = record.points.copy()
        start = int(share * len(points))
        points[start:] = rng.integers(0, 16, len(points) - start)
        records.append(replace(record, points=points))
    return replace(proof, records=tuple(records))


def judged(proof, validator):
    """Return the residuals of a proof's nonces, and their margins where there are any."""
    engine = validator.engine(proof.round.seq_len)
    inputs = proof.header.round.inputs([record.nonce for record in proof.records])
    batches = compute(engine, proof.header.pipeline, inputs, proof.records)
    records = [record for batch in batches for record in batch]
    margins = None
    if records[0].margins is not None:
        margins = np.stack([record.margins for record in records])
    return residuals(proof.records, records), margins


def nonces_needed(honest, cheated):
    """Return n of the head of this file; infinite where the cheat's mean is not above."""
    apart = cheated.mean() - honest.mean()
    if apart <= 0:
        return np.inf
    return max(1.0, float(((FALSE * honest.std() + POWER * cheated.std()) / apart) ** 2))


def bytes_needed(honest, cheated, size, rng):
    """Return the bytes with their interval; None for a number that is infinite."""
    drawn = [
        nonces_needed(rng.choice(honest, len(honest)), rng.choice(cheated, len(cheated)))
        for _ in range(RESAMPLED)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975), method="nearest")
    values = (nonces_needed(honest, cheated), low, high)
    return [None if not np.isfinite(n) else round_to(size * np.ceil(n), 4) for n in values]


def describe(sizes, margins):
    """Return what nonces of one pair show."""
    shown = {
        "nonces": len(sizes),
        "mean": round_to(float(np.mean(sizes))),
        "median": round_to(float(np.median(sizes))),
        "largest": round_to(float(np.max(sizes))),
    }
    if margins is not None:
        largest_N = margins.max(axis=1)
        shown["steps_that_differ"] = round_to(float((margins > 0).mean()), 4)
        shown["largest_margin"] = round_to(float(largest_N.max()), 4)
        shown["nonces_above"] = {str(limit): int((largest_N > limit).sum()) for limit in THRESHOLDS}
    return shown


def programs(halved, options):
    """Yield the names of cheats with the model that each one runs."""
    middle = halved.num_layers // 2
    yield "int4", lambda: cheats.rounded(halved, 4)
    yield "int8", lambda: cheats.rounded(halved, 8)
    yield "float8", lambda: rounded_fp8(halved)
    yield "stale: low-rank change of 0.5 %", lambda: adapted(halved, size=0.005)
    if halved.tokenizer is not None and options.finetuned:
        name = f"stale: {options.finetuned} steps of training earlier"
        yield name, lambda: finetuned(halved, options.finetuned)
    yield f"without layer {middle}", lambda: without_layers(halved, middle)


def chain_only(model, round, nonces, honest, shape):
    """Yield cheats that only a chain has."""
    for name, half in (("prompt of another nonce", False), ("half of the prompt", True)):
        engine = OtherPrompt(model, half=half, **shape)
        yield name, lambda engine=engine: prove(model, round, nonces, engine=engine)
    drawn = {"second half": 0.5, "last eighth": 0.875, "whole": 0.0}
    for name, share in drawn.items():
        yield f"{name} of the chain drawn", lambda share=share: ended_early(honest, share)


def measure(preset, full, halved, options):
    """Return the figures of one preset."""
    pipeline = get_pipeline(preset)
    seq_len = options.prompt if pipeline.steps else options.prompt + options.steps
    round = Round(block_hash="review", public_key="k", seq_len=seq_len, preset=preset)
    nonces = range(options.nonces)
    few = nonces[: options.cheated]
    size = packed_size(pipeline)
    rng = np.random.default_rng(1)
    honest = prove(halved, round, nonces, batch_size=options.batch_size)
    quarter = {"dtype": "float16", "device": options.device}
    makers = {
        "bfloat16": lambda: Side(halved, options.batch_size),
        "float32": lambda: Side(full, options.batch_size),
        "float16": lambda: Side(
            load_model(options.model, **quarter).with_frame(full.frame), options.batch_size
        ),
        "batches of 4": lambda: Side(halved, 4),
        "eager attention": lambda: Side(with_attention(halved, "eager"), options.batch_size),
    }
    validators = {name: make() for name, make in makers.items() if name in options.validators}
    figures = {"bytes": size, "seq_len": seq_len, "steps": pipeline.steps, "honest": {}}
    sizes = {}
    for name, validator in validators.items():
        note(f"{preset}: honest, validator {name}")
        sizes[name], margins = judged(honest, validator)
        figures["honest"][name] = describe(sizes[name], margins)
    if pipeline.output == "points":
        points = np.concatenate([record.points for record in honest.records])
        shares = np.bincount(points, minlength=16) / len(points)
        entropy = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum()
        figures["bits_of_a_step"] = round_to(float(entropy), 4)
    judge = validators[options.validator]
    base = sizes[options.validator]
    figures["cheats"] = {}

    def add(name, make):
        if not any(words in name for words in options.cheats):
            return
        note(f"{preset}: {name}")
        proof = make()
        cheated, margins = judged(proof, judge)
        row = describe(cheated, margins)
        row["times_honest"] = round_to(float(cheated.mean() / base.mean()), 3)
        row["bytes_needed"] = bytes_needed(base, cheated, size, rng)
        figures["cheats"][name] = row

    for name, make in programs(halved, options):
        add(name, lambda make=make: prove(make(), round, few, batch_size=options.batch_size))
    if pipeline.output == "points":
        part = replace(honest, records=honest.records[: options.cheated])
        shape = {"batch_size": options.batch_size, "seq_len": seq_len}
        for name, make in chain_only(halved, round, few, part, shape):
            add(name, make)
    return figures


def main():
    options_parser = parser(__doc__)
    options_parser.add_argument("--model", default="reference:qwen3")
    options_parser.add_argument("--device", default="cpu")
    options_parser.add_argument("--presets", nargs="*")
    options_parser.add_argument("--batch-size", type=int, default=16)
    options_parser.add_argument("--prompt", type=int, default=256)
    options_parser.add_argument("--steps", type=int, default=256)
    options_parser.add_argument("--nonces", type=int, default=64)
    options_parser.add_argument("--cheated", type=int, default=32, help="nonces of every cheat")
    options_parser.add_argument(
        "--finetuned", type=int, default=20, help="steps of a stale checkpoint"
    )
    options_parser.add_argument(
        "--validator", default="float32", help="whose honest law cheats are held to"
    )
    options_parser.add_argument(
        "--validators", nargs="*", default=VALIDATORS, help="of honest pairs"
    )
    options_parser.add_argument(
        "--cheats", nargs="*", default=[""], help="parts of the names of cheats"
    )
    options = options_parser.parse_args()
    torch.manual_seed(0)
    chain, ours = (f"{name}-{options.steps}" for name in ("chain-decode", "decode"))
    presets = options.presets or [chain, "artifact", "tokens-1", ours]
    full = load_model(options.model, dtype="float32", device=options.device)
    if any(get_pipeline(preset).framed for preset in presets):
        full = full.with_frame(measure_frame(full))
    halved = load_model(options.model, dtype="bfloat16", device=options.device)
    halved = halved.with_frame(full.frame)
    figures = {name: getattr(options, name) for name in ("model", "prompt", "steps", "validator")}
    figures["presets"] = {preset: measure(preset, full, halved, options) for preset in presets}
    publish("chain_decode", figures, options.output)


if __name__ == "__main__":
    main()
