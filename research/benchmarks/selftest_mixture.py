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
# Kernels of GPUs divide a product by its size, so a GPU has one worth dividing.
WIDE = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
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
    on_gpu = torch.cuda.is_available()
    batch_size, seq_len = (64, 64) if on_gpu else (8, 16)
    cases = []
    with TemporaryDirectory() as folder:
        sizes = EXPERTS | (WIDE | HEADS if on_gpu else {})
        path = make_mixture("qwen3-moe", Path(folder) / "mixture", **sizes)
        for dtype in formats:
            for preset in presets:
                note(f"{chosen.engine}, {dtype}, {preset}")
                launch = Launch(model=str(path), engine=chosen.engine, dtype=dtype)
                round = Round(block_hash="b", public_key="k", preset=preset, seq_len=seq_len)
                result = run_selftest(launch, round, batch_size=batch_size, nonces=chosen.nonces)
                cases.append({"preset": preset} | asdict(result))
    publish("selftest_mixture", {"sizes": sizes, "cases": cases}, chosen.output)


if __name__ == "__main__":
    main()
