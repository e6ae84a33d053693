"""A transform of your own: how well would another way from hidden state to published value tell
cheaters apart?

    python examples/own_transform.py

A pipeline is data (docs/protocol.md has the table). This one publishes 24 random projections of the
last state instead of 12 picked coordinates. No network agreed on it, so it makes no proof; an
engine runs any pipeline, and that is enough to compare honest noise with what a cheater would hand
in.
"""

import sys

import numpy as np

import assay
from assay.models import Model
from assay.poc import PIPELINES, HFEngine, Pipeline, Round
from assay.poc.cheats import rounded
from assay.poc.protocol.pipelines import Step

WIDE = Pipeline(
    name="wide",
    summary="unit, projection to 24, unit; the vector is published",
    hidden=(Step("unit"), Step("project", 24), Step("unit")),
    output="vector",
)


def published(model: Model, pipeline: Pipeline, nonces: range) -> np.ndarray:
    """Return what a node with this model would publish, [N, K]."""
    engine = HFEngine(model, batch_size=16, seq_len=32)
    round = Round(block_hash="block_alpha", public_key="node_A", preset="artifact", seq_len=32)
    batches = engine.run(round.inputs(nonces), pipeline)
    return np.concatenate([values["vector"] for values in batches]).astype(np.float64)


def main(count: int) -> None:
    """Print, for the published preset and for this one, how much farther a 4-bit model is than an
    honest one.
    """
    exact = assay.load_model("reference:qwen3", dtype="float32", device="cpu")
    honest = assay.load_model("reference:qwen3", dtype="bfloat16", device="cpu")
    cheat = rounded(honest, bits=4)
    nonces = range(count)
    for pipeline in (PIPELINES["artifact"], WIDE):
        wanted = published(exact, pipeline, nonces)
        honest_N = np.linalg.norm(published(honest, pipeline, nonces) - wanted, axis=1)
        cheat_N = np.linalg.norm(published(cheat, pipeline, nonces) - wanted, axis=1)
        ratio = np.median(cheat_N) / np.median(honest_N)
        overlap = (cheat_N[:, None] <= honest_N).mean()
        print(
            f"{pipeline.name}: 4 bits {ratio:.1f} times the honest noise, {overlap:.1%} of pairs "
            f"the wrong way round"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
