"""What a real model shows: honest audits that are accused, the published tables again, and the
speed of `tokens-1`.

*audits*: `calibrate --model` measures the laws of this machine. Then every engine (number format,
kernels, batch) computes the nonces of other blocks once. Each is judged by all engines of its
format, and by those in float32 with the first batch size. One audit is the nonces of a block,
judged by the law and the test that `verify` takes. The experiments *approaches*, *weights* and
*matrix* are those of `assay poc experiment`, beside a bundled model. *throughput*: `prove` with
`tokens-1` beside `poc-2.0`, in turns. After `--minutes` no engine begins another block.

    python research/benchmarks/real_models.py --model DIRECTORY -o research/results/real_models.json

One that shows on a CPU that everything works:

    python research/benchmarks/real_models.py --model DIRECTORY --device cpu \
      --formats float32 bfloat16 \
        --seq-lens 16 --eager --blocks 2 --nonces 16 --batches 8 4 --law-blocks 8 \
        --law-nonces 32 --table-nonces 32 \
        --duration 2 --shape reference:llama --speed-batch 8 --speed-nonces 16 --turns 2

Legend of shapes: B blocks, N nonces of a block, K published numbers, M positions, D hidden size.
"""

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from inspect import signature
from itertools import chain, combinations, product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from _common import note, parser, publish, round_to, timed, wall_seconds
from assay_research.approaches import ApproachPlan, WeightPlan, residual_sizes
from assay_research.matrix import MatrixPlan
from assay_research.runs.report import section_of
from assay_research.runs.runs import read_run
from assay_research.runs.states import published

from assay import stats
from assay.errors import AssayError
from assay.models import load_model
from assay.poc import HFEngine, Round, get_pipeline, measure_frame, prove
from assay.poc.engines.hf.compiled_forward import worth_compiling
from assay.poc.launch import check_loadable, load
from assay.poc.measurement import distances_to_target
from assay.poc.one_machine import calibrate_model
from assay.poc.protocol.header import Header
from assay.poc.verdict.calibration_file import noise_for
from assay.poc.verdict.sample_plan import sequential_test
from assay.stats.chord import rate_standard_error

PRESETS = ("poc-2.0", "artifact", "hardened", "tokens-1")
FORMATS = ("float32", "bfloat16", "float16", "float8", "int8")
REFERENCE = "float32"
SIDES = ("poc-2.0", "tokens-1")  # of the throughput


def measure_law(options, frame, preset, seq_len):
    """Return the calibration of a preset and length, and what it says of itself; or None, and the
    reason.
    """
    given = {
        "preset": preset,
        "seq_len": seq_len,
        "formats": options.formats,
        "device": options.device,
    }
    given |= {"blocks": options.law_blocks, "nonces": options.law_nonces}
    if get_pipeline(preset).framed and "frame" in signature(calibrate_model).parameters:
        given["frame"] = frame
    try:
        seconds, found = timed(lambda: calibrate_model(options.model, **given))
    except Exception as error:  # the other laws are worth their figures
        return None, {"refused": f"{type(error).__name__}: {error}"[:300]}
    builds = {
        " / ".join(sorted(formats)): {"nonces": build.n, "effect": build.effect}
        | {
            name: getattr(build, name) and asdict(getattr(build, name))
            for name in ("law", "spread", "left_out")
        }
        for build in found.builds
        if REFERENCE in (formats := {one.dtype for one in build.engines}) or len(formats) == 1
    }
    said = {
        "seconds": round_to(seconds),
        "block_factor_dimension": found.builds[0].effective_dimension,
    }
    return found, said | {"builds": builds}


def dimension_of(engine, round):
    """Return 1/Σ e² for the mean energies e of the coordinates of what a preset reads, scaled to
    length one.
    """
    hidden = get_pipeline("end-normalize").hidden
    reading = replace(
        get_pipeline(round.preset), hidden=hidden, head="none", logits=(), output="vector"
    )
    (states_ND,) = published(engine, round, [reading], range(256)).values()
    energy_D = (states_ND.astype(np.float64) ** 2).mean(axis=0)
    return round_to(float(energy_D.sum() ** 2 / (energy_D**2).sum()), 4)


def rounds_of(options, preset, seq_len):
    """Return the rounds of the audits."""
    shape = {"public_key": "audit", "preset": preset, "seq_len": seq_len, "model": options.model}
    return [Round(block_hash=f"audit-{block}", **shape) for block in range(options.blocks)]


def compute(options, frame, name, seq_len, until):
    """Return what every engine of a format publishes, [B, N, K] by preset, with its header; and the
    dimensions.
    """
    model = load(options.model, name, options.device).with_frame(frame)
    rounds = {preset: rounds_of(options, preset, seq_len) for preset in options.presets}
    shared = {}
    for pipeline in map(get_pipeline, options.presets):
        shared.setdefault((pipeline.read, pipeline.texts, pipeline.inputs), []).append(pipeline)
    found = {}
    failed = {}
    dimensions = {}
    for batch, compiled in product(options.batches, (False,) if options.eager else (False, True)):
        label = f"{name} {'compiled' if compiled else 'eager'} {batch}"
        mine = {name: [] for name in options.presets}
        try:
            engine = HFEngine(model, batch_size=batch, seq_len=seq_len, compiled=compiled)
            if name == REFERENCE and not dimensions:
                dimensions = {
                    preset: dimension_of(engine, rounds[preset][0]) for preset in options.presets
                }
            for block in range(
                min(options.blocks, options.single_blocks if batch == 1 else options.blocks)
            ):
                if time.time() > until and block:
                    break
                for group in shared.values():
                    round = rounds[group[0].name][block]
                    for preset, values in published(
                        engine, round, group, range(options.nonces)
                    ).items():
                        mine[preset].append(values)
        except Exception as error:  # the other engines are worth their figures
            failed[label] = f"{type(error).__name__}: {error}"[:300]
            continue
        header = {
            "digest": model.digest,
            "weights": model.weights,
            "fingerprint": engine.fingerprint,
        }
        found[label] = header, {preset: np.stack(values) for preset, values in mine.items()}
    return found, failed, dimensions


def judge(options, law, found, preset, seq_len):
    """Return how many honest audits the law accuses, by pair of formats, and the valid rates of the
    blocks.
    """
    pipeline = get_pipeline(preset)
    rounds = rounds_of(options, preset, seq_len)
    tests = {}
    rows = {}
    first = next(
        values[preset] for label, (_, values) in found.items() if label.startswith(REFERENCE)
    )
    for (one, (said, mine)), (other, (theirs, values)) in combinations(found.items(), 2):
        formats = one.split()[0], other.split()[0]
        usual = REFERENCE in formats and (one + other).count(f" {options.batches[0]}") == 2
        if law is None or not (usual or formats[0] == formats[1]):
            continue
        row = rows.setdefault(
            " / ".join(sorted(formats)), {"accused": {}, "pairs": {}, "refused": {}}
        )
        for block, (mine_N, theirs_N) in enumerate(zip(mine[preset], values[preset], strict=False)):
            frame = options.frame if pipeline.framed else ""
            header = Header(
                round=rounds[block],
                pipeline=pipeline,
                frame=frame,
                nonces=((0, len(mine_N), 1),),
                **said,
            )
            try:
                noise = noise_for(header, theirs["fingerprint"], law)
            except AssayError as error:
                row["refused"][f"{one} / {other}"] = error.seen
                break
            if str(noise) not in tests:  # a law of vectors is that of every block
                tests[str(noise)] = sequential_test(noise)
            accused = bool(
                tests[str(noise)].accusations(residual_sizes(mine_N, theirs_N)[None])[0, -1]
            )
            row["accused"].setdefault(block, []).append(accused)
            if accused:
                row["pairs"][f"{one} / {other}"] = row["pairs"].get(f"{one} / {other}", 0) + 1
    for row in rows.values():
        of_blocks = list(row.pop("accused").values())
        for name, hits in {
            "audits": [*chain(*of_blocks)],
            "blocks": [any(hits) for hits in of_blocks],
        }.items():
            row[name] = [sum(hits), len(hits), *stats.proportion_interval(sum(hits), len(hits))]
    return {"valid_rates": valid_rates(first, pipeline, rounds), "accused, of, interval": rows}


def valid_rates(values_BNK, pipeline, rounds):
    """Hold the valid rate of every block against the chord law."""
    size = pipeline.output_size(values_BNK.shape[-1], 0)
    rows = {}
    for rate in (0.5, 0.1):
        target = stats.r_target_for(rate, size)
        error = rate_standard_error(rate, values_BNK.shape[1])
        pairs = zip(values_BNK, rounds, strict=False)
        rates_B = np.array(
            [(distances_to_target(values_NK, round) < target).mean() for values_NK, round in pairs]
        )
        off_B = np.abs(rates_B - rate) / error
        row = {
            "within_3_errors": int((off_B <= 3).sum()),
            "blocks": off_B.size,
            "largest_error": float(off_B.max()),
        }
        rows[f"{rate:.0%}"] = row | {"rates": rates_B.round(4).tolist()}
    return rows


def measure_audits(options):
    """Return figures of every preset and length: law, dimension, valid rates, and accused
    audits.
    """
    refused = {}
    cells = list(product(options.presets, options.seq_lens))
    for name in options.formats:
        try:
            check_loadable(options.model, name, options.device)
        except AssayError as error:
            refused[name] = error.seen
    options.formats = [name for name in options.formats if name not in refused]
    pools = ProcessPoolExecutor(options.workers, get_context("spawn"))
    with TemporaryDirectory() as temporary, pools as pool:
        frame = Path(temporary) / "frame"
        until = time.time() + 60 * options.minutes
        made = measure_frame(load_model(options.model, dtype=REFERENCE, device=options.device))
        made.save(frame)
        options.frame = made.sha256
        laws = {cell: pool.submit(measure_law, options, frame, *cell) for cell in cells}
        parts = product(options.formats, options.seq_lens)
        values = {cell: pool.submit(compute, options, frame, *cell, until) for cell in parts}
        found = {}
        failed = {}
        dimensions = {}
        for (name, seq_len), work in values.items():
            note(
                f"{name} at {seq_len} positions: "
                f"{'all failed' if not work.result()[0] else 'computed'}"
            )
            for part, mine in zip((found, failed, dimensions), work.result(), strict=True):
                part.setdefault(seq_len, {}).update(mine)
        judged = {
            cell: pool.submit(judge, options, laws[cell].result()[0], found[cell[1]], *cell)
            for cell in cells
        }
        blocks = {
            n: {k: len(next(iter(values.values()))) for k, (_, values) in of.items()}
            for n, of in found.items()
        }
        figures = {
            "hidden_size": made.mean.size,
            "not_offered": refused,
            "failed": failed,
            "blocks": blocks,
        }
        for (preset, seq_len), work in judged.items():
            said = {
                "effective_dimension": dimensions[seq_len].get(preset),
                "law": laws[preset, seq_len].result()[1],
            }
            figures[f"{preset} at {seq_len}"] = said | work.result()
        return figures


def measure_table(plan, options, **settings):
    """Return what an experiment says of the model and of the bundled one beside it."""
    models = tuple(dict.fromkeys((options.model, "reference:qwen3")))
    shape = {"device": options.device, "seq_len": options.seq_lens[-1], "batch_size": 32}
    plan = plan(
        models=models,
        **shape,
        **{name: getattr(options, value) for name, value in settings.items()},
    )
    with TemporaryDirectory() as temporary:
        plan.measure(Path(temporary), note=note)
        found = section_of(read_run(Path(temporary), plan.experiment)).values
    for block in (
        block for row in found.get("configurations", ()) for block in row["blocks"].values()
    ):
        block["interval"] = stats.proportion_interval(
            round(block["rate"] * block["checked"]), block["checked"]
        )
    return found


def measure_throughput(options):
    """Return the ratio of nonces per second of `tokens-1` to those of `poc-2.0`, of neighbouring
    turns.
    """
    rows = {}
    rounds = range(options.turns)
    for reference in (options.model, options.shape):
        model = load_model(reference, dtype="bfloat16", device=options.device)
        model = model.with_frame(measure_frame(model))
        shape = {"batch_size": options.speed_batch, "seq_len": options.seq_lens[-1]}
        engine = HFEngine(model, **shape, compiled=worth_compiling(model))

        def seconds(preset, count, engine=engine, model=model, length=shape["seq_len"]):
            round = Round(block_hash="speed", public_key="k", preset=preset, seq_len=length)
            return wall_seconds(lambda: prove(model, round, range(count), engine=engine))

        for preset in SIDES:
            seconds(preset, engine.batch_size)  # compiles
        turns = [
            [options.speed_nonces / seconds(preset, options.speed_nonces) for preset in SIDES]
            for _ in rounds
        ]
        rates = dict(zip(SIDES, np.median(turns, axis=0).tolist(), strict=True))
        ratios = [round_to(after / before, 4) for before, after in turns]
        rows[reference] = {
            "fingerprint": engine.fingerprint.as_dict(),
            "nonces_per_second": rates,
            "ratio": median(ratios),
            "ratios": ratios,
        }
    return rows


PARTS = {
    "audits": measure_audits,
    "approaches": partial(measure_table, ApproachPlan, nonces="table_nonces"),
    "weights": partial(measure_table, WeightPlan, nonces="table_nonces"),
    "matrix": partial(measure_table, MatrixPlan, duration="duration"),
    "throughput": measure_throughput,
}


def main():
    made = parser(__doc__)
    made.add_argument("--model", required=True)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--presets", nargs="+", default=PRESETS)
    made.add_argument(
        "--formats", nargs="+", default=FORMATS, help="float32 is needed, and judges the others"
    )
    made.add_argument(
        "--seq-lens",
        nargs="+",
        type=int,
        default=[16, 64, 256],
        help="the last is that of other parts",
    )
    made.add_argument(
        "--batches", nargs="+", type=int, default=[32, 8, 1], help="the first judges other formats"
    )
    made.add_argument("--blocks", type=int, default=40)
    made.add_argument(
        "--single-blocks", type=int, default=10, help="of a batch of one, which is slow"
    )
    made.add_argument("--nonces", type=int, default=64, help="of an audit")
    made.add_argument("--eager", action="store_true", help="without compiled kernels")
    made.add_argument("--law-blocks", type=int, default=16)
    made.add_argument("--law-nonces", type=int, default=64)
    made.add_argument(
        "--workers", type=int, default=1, help="processes of the audits, which share the device"
    )
    made.add_argument(
        "--minutes", type=float, default=4.0, help="after which no engine begins another block"
    )
    made.add_argument("--table-nonces", type=int, default=1024)
    made.add_argument("--duration", type=float, default=4.0, help="seconds of a test of the matrix")
    made.add_argument(
        "--shape", default="shape:qwen3-0.6b", help="the other model of the throughput"
    )
    made.add_argument("--speed-batch", type=int, default=128)
    made.add_argument("--speed-nonces", type=int, default=4096, help="of a turn")
    made.add_argument("--turns", type=int, default=7)
    options = made.parse_args()
    figures = {name: value for name, value in vars(options).items() if name != "output"}
    for part in options.parts:
        seconds, found = timed(lambda part=part: PARTS[part](options))
        figures[part] = {"seconds": round_to(seconds, 4)} | found
        publish("real_models", figures, options.output)


if __name__ == "__main__":
    main()
