"""How far a mixture in four bits is from itself with the scales of its experts exchanged as vLLM 0.32 exchanges them.

Two workers of vLLM on two H200 were far from transformers with such a mixture (`vllm_parallel.py`, case "mixture-tp2,
packed"). If the order of scales is the reason, transformers with scales in that order is as far from transformers with
the right ones. Both are computed here on a CPU with the same mixture, round and number of positions. vLLM prepares the
scales of an expert's first products in the order of one group per row, and its kernel reads them in that of several;
both orders are asked of vLLM.

    .venv-vllm/bin/python benchmarks/vllm_scales.py -o benchmarks/results/vllm_scales.json
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from _common import note, parser, publish
from vllm_parallel import GROUP, PRESETS, make_checkpoints, published

from assay import poc
from assay.models import load_model
from assay.poc.engines.hf import HFEngine
from assay.reports import read_json
from tests.models.storing import rewrite

FIRST = ("gate_proj.weight_scale", "up_proj.weight_scale")
CASE, MEASURED = "mixture-tp2, packed", Path(__file__).parent / "results/vllm_parallel_h200x2_experts.json"


def exchanged(tensors):
    """Put the scales of the first products of all experts where vLLM's kernel finds them."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils import get_scale_perms

    several, single = map(torch.tensor, get_scale_perms())
    for name, scales in tensors.items():
        if ".experts." in name and name.endswith(FIRST):
            by_group = scales.t().contiguous()
            prepared = by_group.reshape(-1, len(single))[:, single]
            read = prepared.reshape(-1, len(several))[:, several.argsort()]
            tensors[name] = read.reshape(by_group.shape).t().contiguous()


def main():
    made = parser(__doc__)
    made.add_argument("--nonces", type=int, default=128)
    arguments = made.parse_args()
    measured = next(case for case in read_json(MEASURED)["cases"] if case["name"] == CASE)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder, arguments.cases = Path(folder), [CASE]
        arguments.model, arguments.dtype, arguments.seq_len = (
            "reference:qwen3",
            "bfloat16",
            read_json(MEASURED)["seq_len"],
        )
        make_checkpoints(arguments)
        right = arguments.folder / "mixture-packed"
        wrong = shutil.copytree(right, arguments.folder / "exchanged")
        rewrite(wrong, exchanged)
        models = [load_model(path, dtype=arguments.dtype, device="cpu") for path in (right, wrong)]
        for preset in PRESETS:
            shape = {"seq_len": arguments.seq_len, "preset": preset, "strength": 256}
            asked = poc.Round(block_hash="fresh", public_key="k", model="m", **shape)
            proofs = []
            for model in models:
                engine = HFEngine(model, batch_size=32, seq_len=arguments.seq_len)
                proofs.append(published(poc.prove(model, asked, range(arguments.nonces), engine=engine)))
            found[preset] = {
                "median": float(np.median(np.abs(proofs[0] - proofs[1]))),
                "vllm_median": measured["presets"][preset]["residual_median"],
            }
            note(f"{preset}: {found[preset]}")
    publish("vllm_scales", {"nonces": arguments.nonces, "group": GROUP, "presets": found}, arguments.output)


if __name__ == "__main__":
    main()
