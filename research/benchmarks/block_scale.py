"""What a block does to its distances and to their honest noise, against what its folded head predicts.

Every nonce of a block is compared with one vector v = Wᵀt, the random head folded onto the target. Three predictions of
the scale of a block are compared with what is measured: the length of v; its length under the mean energy profile p of
the hidden states, √(Σ vᵢ²pᵢ); and under the profile of the noise itself. Noise is the difference between float32 and a
half format, its scale the median of its size.

*own*: every block has its own nonces, as in a proof. *common*: the hidden states of the first nonces of all blocks are
used in every block, under its own signs, reflections and head, so that blocks differ in nothing else.

    python benchmarks/block_scale.py -o benchmarks/results/block_scale.json
"""

import numpy as np
import torch
from _common import note, parser, publish

from assay import stats
from assay.models import load_model
from assay.poc import HFEngine, Round, get_pipeline
from assay.poc.engines import make_transform
from assay.poc.protocol import RANDOM_HEAD_ROWS, block_scale, folded_head
from assay.research.runs import states

MODELS = ("reference:qwen3", "reference:llama")
FORMATS = ("bfloat16", "float16")
PIPELINE = get_pipeline("poc-2.0")
DRAWS = 200  # of the bootstrap that gives a block's sampling error


def hidden_states(engine, rounds, nonces):
    """Return the last hidden states of every block's nonces, [blocks, nonces, D] in float32."""
    found = []
    for round in rounds:
        batches = states(engine, make_transform(engine, round, PIPELINE), range(nonces))
        found.append(torch.cat([x_BD.clone() for _, x_BD in batches])[:nonces])
    return torch.stack(found)


def distances(engine, rounds, h_MND):
    """Return the published distances of hidden states [blocks, N, D], or of [N, D] under every block."""
    found = []
    for index, round in enumerate(rounds):
        transform = make_transform(engine, round, PIPELINE)
        h_ND = h_MND if h_MND.ndim == 2 else h_MND[index]
        found.append(
            torch.cat(
                [transform(h_ND[i : i + 256], range(i, min(i + 256, len(h_ND)))) for i in range(0, len(h_ND), 256)]
            )
        )
    return torch.stack(found).numpy().astype(np.float64)


def profile(x_ND):
    """Return the mean share of every coordinate in the energy of its row, [D]."""
    energy_ND = x_ND.reshape(-1, x_ND.shape[-1]).numpy().astype(np.float64) ** 2
    return (energy_ND / energy_ND.sum(axis=1, keepdims=True)).mean(axis=0)


def against(scale_M, sampling, predictors):
    """Say how far each predictor takes the differences between blocks away, in logarithms."""
    log_M = np.log(scale_M)
    rows = {}
    for name, predicted_M in predictors.items():
        by_M = np.log(predicted_M)
        rows[name] = {
            "correlation": float(np.corrcoef(log_M, by_M)[0, 1]),
            "sd_left": float((log_M - by_M).std(ddof=1)),
        }
    return {"sd_between_blocks": float(log_M.std(ddof=1)), "sd_of_sampling": sampling, "predictors": rows}


def median_size(e_MN):
    """Return the median size per block with the mean standard error of its logarithm over nonces."""
    rng = np.random.default_rng(0)
    size_MN = np.abs(e_MN)
    drawn = rng.integers(0, size_MN.shape[1], (DRAWS, size_MN.shape[1]))
    logs = np.log(np.stack([np.median(size_MN[:, row], axis=1) for row in drawn]))
    return np.median(size_MN, axis=1), float(np.sqrt((logs.std(axis=0) ** 2).mean()))


def measure(reference, options, rounds):
    """Return the figures of one model."""
    shape = {"batch_size": options.batch_size, "seq_len": options.seq_len}
    engines = {
        name: HFEngine(load_model(reference, dtype=name, device="cpu"), **shape) for name in ("float32", *FORMATS)
    }
    hidden = {}
    for name, engine in engines.items():
        note(f"{reference} {name}")
        hidden[name] = hidden_states(engine, rounds, options.nonces)
    exact, engine = hidden["float32"], engines["float32"]
    size = exact.shape[-1]
    v_MD = np.stack([folded_head(round, size) for round in rounds])
    p_D = profile(exact)
    by_length = np.array([block_scale(round, size) for round in rounds])
    by_states = np.sqrt((v_MD**2) @ p_D)
    figures = {"hidden_size": size, "effective_dimension_of_energy": float(1 / (p_D**2).sum())}
    sources = {"own": exact, "common": exact.reshape(-1, size)[: options.common]}
    true = {name: distances(engine, rounds, h) for name, h in sources.items()}
    for name, d_MN in true.items():
        cosines_MN = 1 - d_MN**2 / 2
        sampling = 1 / np.sqrt(2 * d_MN.shape[1])
        figures[f"distances_{name}"] = {
            "sd_over_law": (cosines_MN.std(axis=1) * np.sqrt(RANDOM_HEAD_ROWS)).tolist(),
            **against(cosines_MN.std(axis=1), float(sampling), {"length": by_length, "states": by_states}),
        }
    for kind in FORMATS:
        other = {"own": hidden[kind], "common": hidden[kind].reshape(-1, size)[: options.common]}
        unit = [torch.nn.functional.normalize(x, dim=-1) for x in (hidden[kind], exact)]
        q_D = profile(unit[0] - unit[1])
        predictors = {"length": by_length, "states": by_states}
        predictors["noise"] = np.sqrt((v_MD**2) @ q_D)
        figures[kind] = {"effective_dimension_of_noise": float(1 / (q_D**2).sum())}
        for name, h in other.items():
            scale_M, sampling = median_size(distances(engines[kind], rounds, h) - true[name])
            figures[kind][name] = {"median": float(np.median(scale_M)), **against(scale_M, sampling, predictors)}
            note(f"{reference} {kind} {name}: {figures[kind][name]}")
    return figures


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--blocks", type=int, default=24)
    arguments.add_argument("--nonces", type=int, default=256, help="of every block")
    arguments.add_argument("--common", type=int, default=2048, help="hidden states that are used in every block")
    arguments.add_argument("--seq-len", type=int, default=64)
    arguments.add_argument("--batch-size", type=int, default=32)
    options = arguments.parse_args()
    rounds = [
        Round(block_hash=f"block_{number}", public_key="node_A", seq_len=options.seq_len)
        for number in range(options.blocks)
    ]
    figures = {
        **{name: getattr(options, name) for name in ("blocks", "nonces", "common", "seq_len", "batch_size")},
        "chord_std": stats.chord_std(RANDOM_HEAD_ROWS),
        "models": {reference: measure(reference, options, rounds) for reference in MODELS},
    }
    publish("block_scale", figures, options.output)


if __name__ == "__main__":
    main()
