"""The self-test of an engine on a small mixture of experts: 32 experts of which two are asked.

The mixture has random weights, so its laws are of no use: the table says which settings change
bits, and by how many.

    python research/benchmarks/selftest_mixture.py -o research/results/selftest_mixture.json
    .venv-vllm/bin/python research/benchmarks/selftest_mixture.py --engine vllm \
      -o research/results/selftest_mixture_vllm.json
"""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _common import note, parser, publish

from assay.poc import Round
from assay.poc.launch import Launch
from assay.poc.selftest import run_selftest

EXPERTS = {"num_experts": 32, "num_experts_per_tok": 2}
HEADS = {"head_dim": 64, "num_key_value_heads": 4}  # GPUs have no kernels for heads of 32
PRESETS = ("artifact", "poc-2.0")


def main():
    """Run the self-test in the number formats of an engine."""
    from tests.models.storing import make_mixture

    arguments = parser(__doc__)
    arguments.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    arguments.add_argument("--nonces", type=int, default=64)
    chosen = arguments.parse_args()
    formats = ("float32", "bfloat16") if chosen.engine == "hf" else ("bfloat16",)
    presets = PRESETS if chosen.engine == "hf" else PRESETS[:1]
    cases = []
    with TemporaryDirectory() as folder:
        sizes = EXPERTS | (HEADS if torch.cuda.is_available() else {})
        path = make_mixture("qwen3-moe", Path(folder) / "mixture", **sizes)
        for dtype in formats:
            for preset in presets:
                note(f"{chosen.engine}, {dtype}, {preset}")
                launch = Launch(model=str(path), engine=chosen.engine, dtype=dtype)
                round = Round(block_hash="b", public_key="k", preset=preset, seq_len=16)
                result = run_selftest(launch, round, batch_size=8, nonces=chosen.nonces)
                rows = [asdict(row) for row in result.comparisons]
                cases.append({"preset": preset, "engine": result.engine, "settings": rows})
    publish("selftest_mixture", {"experts": EXPERTS, "cases": cases}, chosen.output)


if __name__ == "__main__":
    main()
