"""A real model in vLLM: the speed of `tokens-1` beside `poc-2.0` in one engine, and honest audits
between vLLM and transformers under the law of these two, which `calibrate` fits to proofs of other
blocks.

    python research/benchmarks/vllm_real.py --model DIRECTORY -o research/results/vllm_real.json
"""

from statistics import median

import torch
from _common import parser, publish, round_to, wall_seconds

from assay import poc, stats
from assay.models import load_model
from assay.poc import HFEngine, Round, calibrate, measure_frame
from assay.poc.verdict.residuals import residuals
from assay.poc.verdict.sample_plan import sequential_test
from assay.poc.vllm.vllm_engine import VLLMEngine

OPTIONS = {
    "max_num_batched_tokens": 16384,
    "max_num_seqs": 256,
    "max_model_len": 512,
    "gpu_memory_utilization": 0.3,
}
SPEED = {"auto": (160, 1024), "requests": (3, 256)}
LAW_BLOCKS = 16  # turns and nonces by the way they take


def measure_speed(engine, options):
    """Return the nonces per second of both presets in turns, by the way they take."""
    rows = {}
    throttle = engine.client.throttle
    for method, (turns, count) in SPEED.items():
        throttle.settings = throttle.settings.model_copy(update={"path": method})

        def rate(preset, nonces, engine=engine):
            round = Round(
                block_hash="speed", public_key="k", preset=preset, seq_len=options.seq_len
            )
            return nonces / wall_seconds(
                lambda: poc.prove(engine.model, round, range(nonces), engine=engine)
            )

        presets = ("poc-2.0", "tokens-1")
        for preset in presets:
            rate(preset, 256)
        seen = [[rate(preset, count) for preset in presets] for _ in range(turns)]
        ratios = [round_to(after / before, 4) for before, after in seen]
        rates = [round_to(median(side), 4) for side in zip(*seen, strict=True)]
        rows[method] = {
            "nonces_per_second": dict(zip(presets, rates, strict=True)),
            "ratio": median(ratios),
            "ratios": ratios,
        }
    throttle.settings = throttle.settings.model_copy(update={"path": "auto"})
    return rows


def measure_audits(engine, model, preset, options):
    """Return how many audits of a block between vLLM and transformers accuse, with the interval."""
    plain = HFEngine(model, batch_size=32, seq_len=options.seq_len, compiled=False)
    of_all = {"public_key": "k", "preset": preset, "seq_len": options.seq_len}
    rounds = [
        Round(block_hash=f"audit-{block}", **of_all) for block in range(LAW_BLOCKS + options.blocks)
    ]
    sides = (engine.model, engine), (model, plain)
    proofs = [
        [poc.prove(model_of_side, round, range(64), engine=by) for model_of_side, by in sides]
        for round in rounds
    ]
    measured = [proof for pair in proofs[:LAW_BLOCKS] for proof in pair]
    build = calibrate(*measured, hidden_size=model.hidden_size).builds[0]
    accused = []
    for round, pair in zip(rounds[LAW_BLOCKS:], proofs[LAW_BLOCKS:], strict=True):
        test = sequential_test(build.noise_between("", plain.fingerprint, round=round))
        accused.append(
            test.update(residuals(*(proof.records for proof in pair))).verdict == "fraud"
        )
    result = {
        "typical": round_to(build.sizes.typical, 3),
        "accused": sum(accused),
        "audits": len(accused),
    }
    return result | {"interval": stats.proportion_interval(sum(accused), len(accused))}


def main():
    options_parser = parser(__doc__)
    options_parser.add_argument("--model", required=True)
    options_parser.add_argument("--seq-len", type=int, default=256)
    options_parser.add_argument("--blocks", type=int, default=40)
    options_parser.add_argument("--dtype", default="bfloat16")
    options = options_parser.parse_args()
    model = load_model(options.model, dtype=options.dtype, device="cuda")
    model = model.with_frame(measure_frame(model))
    shape = {"dtype": options.dtype, "batch_size": 128, "seq_len": options.seq_len}
    with VLLMEngine(
        options.model, **shape, **OPTIONS
    ) as engine:  # takes embeddings, and tokens too
        engine.frame, engine.model = model.frame, engine.model.with_frame(model.frame)
        figures = {name: value for name, value in vars(options).items() if name != "output"}
        figures |= {
            "device": torch.cuda.get_device_name(),
            "fingerprint": engine.fingerprint.as_dict(),
        }
        figures["speed"] = measure_speed(engine, options)
        publish("vllm_real", figures, options.output)
        for preset in ("tokens-1", "hardened", "artifact", "poc-2.0"):
            figures[preset] = measure_audits(engine, model, preset, options)
            publish("vllm_real", figures, options.output)


if __name__ == "__main__":
    main()
