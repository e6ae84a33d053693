"""How far is a missing expert from honest noise? A mixture with random weights, and the same shape after training.

The shape is that of `assay.research.redteam` (8 experts, 4 asked, 4 layers). The trained one reads task
statements, programs and tests of `assay.vhack.environment`, a few minutes on one core. Both get the inputs of
`hardened`, and the sum of all positions is read with signs, 16 draws of them for each of 32 nonces.

Attackers leave out whole experts of every position, or the pairs of position and expert with the smallest weights,
evenly or more of them in later layers; those that save a quarter of the work count. They and the validator have
float32, the honest prover ``--dtype``. With ``--dtype float8`` all have that, and provers attend by other kernels than
the validator. *Bound* reads the 32 directions in which this very attack is furthest from noise (measured on other
nonces): no frame of as many directions is dearer for it. *Flips* are positions where an honest prover asks
other experts than the validator. *Checked* is after how many nonces the sequential test accuses with 99 %, at 1e-3
false accusations, under a law fitted to 64 honest nonces, and under the default law, which is of denser models and does
not exist in float8.

    OMP_NUM_THREADS=1 python benchmarks/hardened_experts.py -o benchmarks/results/hardened_experts.json
    OMP_NUM_THREADS=1 python benchmarks/hardened_experts.py --dtype float16 \
        -o benchmarks/results/hardened_experts_float16.json
    OMP_NUM_THREADS=1 python benchmarks/hardened_experts.py --dtype float8 \
        -o benchmarks/results/hardened_experts_float8.json
"""

import math
import tempfile
from pathlib import Path

import torch
from _common import note, parser, publish
from hardened_frame import covariance, eigen_rows, epsilon
from torch.nn import functional

from assay.models import backbone, decoder_layers, in_format, load_model
from assay.poc import HFEngine, Round, get_pipeline
from assay.poc.protocol import unit
from assay.poc.verdict import default_noise
from assay.research import cheats
from assay.research.redteam import Judge, Pool, Reading, smallest
from assay.research.redteam._attacks import OnEngine
from assay.research.redteam._experts import (
    ASKED,
    EXPERTS_SAVED,
    SEQ_LEN,
    SHAPE,
    experts_cost,
    make_experts,
    without_light_experts,
)
from assay.vhack.environment import tasks

STEPS, BATCH, LENGTH, RATE, BALANCE = 400, 16, 128, 3e-3, 0.01
NONCES, FITTED, DRAWS, ROWS, JUDGED = 32, 64, 16, 32, 64
SHARES = EXPERTS_SAVED | {
    "lightest, many more of them in later layers": (0, 1 / 3, 1 / 2, 1 / 2),
    "lightest, in the last two layers": (0, 0, 7 / 12, 3 / 4),
    "lightest, in earlier layers": (1 / 2, 1 / 2, 1 / 3, 0),
}


def corpus(tokenizer):
    """Tokens of 2000 tasks with their programs and tests, each closed by the end of text."""
    found = []
    for task in tasks(2000, seed=0):
        checks = (f"assert solve({given!r}) == {value!r}\n" for (given,), value in task.visible + task.hidden)
        text = f"# {task.statement}\n{task.source()}{''.join(checks)}"
        found += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(found)


def train(folder, steps):
    """Train a mixture of the shape, save it, and say how well it predicts the last tenth of the text."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from assay.models import checkpoint_directory

    tokenizer = AutoTokenizer.from_pretrained(checkpoint_directory("reference:qwen3"))
    stream_N = corpus(tokenizer)
    held_out_N, stream_N = stream_N[len(stream_N) * 9 // 10 :], stream_N[: len(stream_N) * 9 // 10]
    changes = {"vocab_size": len(tokenizer), "initializer_range": 0.02, "tie_word_embeddings": True}
    torch.manual_seed(0)
    module = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE | changes, output_router_logits=True))
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 20) * (0.01 + 0.495 * (1 + math.cos(math.pi * step / steps)))
        starts = torch.randint(len(stream_N) - LENGTH - 1, (BATCH, 1), generator=generator)
        loss, balance = losses(module, stream_N[starts + torch.arange(LENGTH + 1)])
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            note(f"step {step}: {loss.item():.2f} nats")
    module.save_pretrained(folder)
    with torch.no_grad():
        windows = held_out_N[: 64 * (LENGTH + 1)].view(64, -1)
        loss = losses(module, windows)[0].item()
    share = torch.bincount(held_out_N).double() / len(held_out_N)
    return {"nats_per_token": loss, "unigram_nats": -torch.special.xlogy(share, share).sum().item(), "steps": steps}


def losses(module, tokens_BT):
    """Mean negative log likelihood of the next token, and the loss that keeps the experts equally busy."""
    output = module(input_ids=tokens_BT[:, :-1], use_cache=False)
    return functional.cross_entropy(output.logits.flatten(0, 1), tokens_BT[:, 1:].flatten()), output.aux_loss


class Prover:
    """Unit states of all positions of a round's nonces, and the experts that were asked."""

    def __init__(self, model):
        self.model, self.engine = model, HFEngine(model, batch_size=16, seq_len=SEQ_LEN)

    def residuals(self, reading):
        """Distances of what `hardened` publishes from the validator's, [N]."""
        return reading.residuals("hardened", reading.states(OnEngine(self.engine), self.engine, JUDGED))

    @torch.inference_mode()
    def states(self, block, nonces):
        """States [N, T, D], and for every layer the experts of every position, sorted, [N·T, A]."""
        round = Round(block_hash=block, public_key="k", preset="hardened", seq_len=SEQ_LEN)
        asked = [[] for _ in range(self.model.num_layers)]
        layers = decoder_layers(self.model.module)
        handles = [
            layer.mlp.gate.register_forward_hook(lambda m, a, out, k=kept: k.append(out[2].sort(1).values))
            for layer, kept in zip(layers, asked, strict=True)
        ]
        body, found = backbone(self.model.module), []
        for start in range(0, nonces, 16):
            inputs_BTD = self.engine.inputs(round, range(start, start + 16))
            found.append(unit(body(inputs_embeds=inputs_BTD, use_cache=False).last_hidden_state.float()))
        for handle in handles:
            handle.remove()
        return torch.cat(found), [torch.cat(kept) for kept in asked]


def attackers(model):
    """Name, model and cost."""
    for count in (3, 2):
        yield f"{count} of {ASKED} experts", cheats.with_fewer_experts(model, count), experts_cost(count)
    for name, shares in SHARES.items():
        cost = experts_cost(ASKED * (1 - sum(shares) / len(shares)))
        yield f"{name} left out", without_light_experts(model, shares), cost


def measure(path, dtype):
    """Honest noise with its flips, and every attacker over it."""
    in_float8 = dtype == "float8"
    whole, half = (
        load_model(path, **in_format(name, rest="bfloat16"), device="cpu")
        for name in (dtype if in_float8 else "float32", dtype)
    )
    if in_float8:
        half.module.set_attn_implementation("eager")
    blocks = (("scored", NONCES), ("fitted", FITTED))
    truth, honest = ([Prover(model).states(*block) for block in blocks] for model in (whole, half))
    generator = torch.Generator().manual_seed(0)
    signs_BST = torch.randint(0, 2, (NONCES, DRAWS, SEQ_LEN), generator=generator) * 2.0 - 1
    noise_DD = covariance(honest[1][0] - truth[1][0])

    def distance(states_BTD, frame_KD=None):
        frame = torch.eye(states_BTD.shape[-1]) if frame_KD is None else frame_KD.float()
        return epsilon(signs_BST @ states_BTD, signs_BST @ truth[0][0], frame)

    round = Round(block_hash="judged", public_key="k", preset="hardened", seq_len=SEQ_LEN)
    reading = Reading(Prover(whole).engine, round, ["hardened"])
    judges = judges_of(Prover(half).residuals(reading), dtype)
    rows, noise = [], distance(honest[0][0])
    for name, model, cost in attackers(half if in_float8 else whole):
        prover = Prover(model)
        states_BTD, fitted_BTD = (prover.states(*block)[0] for block in blocks)
        frame_KD = eigen_rows(covariance(fitted_BTD - truth[1][0]), noise_DD, ROWS)
        error = distance(states_BTD)
        bound = distance(states_BTD, frame_KD) / distance(honest[0][0], frame_KD)
        pool = Pool(((1.0, prover.residuals(reading)),))
        row = {"name": name, "cost": cost, "error": error, "ratio": error / noise, "bound": bound}
        rows.append(row | {law: smallest(judge.sequential(pool)) for law, judge in judges.items()})
        note(f"{rows[-1]}")
    saving = [row for row in rows if row["cost"] <= 0.7505]
    best = min(saving, key=lambda row: row["ratio"])
    return {"honest": noise, **flips(truth[0], honest[0]), "best": best["name"], "ratio": best["ratio"], "rows": rows}


def judges_of(honest_N, dtype):
    """The sequential test under the law of these honest residuals, and under the default one."""
    pipeline = get_pipeline("hardened")
    judges = {"checked": Judge(pipeline, honest_N)}
    if dtype != "float8":  # of which there is no default
        judges["checked_default"] = Judge(pipeline, honest_N, default_noise(pipeline.noise, dtype, "float32"))
    return judges


def flips(truth, honest):
    """The share of positions with other experts in any layer, and the noise with and without them."""
    flipped_N = torch.stack([(a != b).any(1) for a, b in zip(truth[1], honest[1], strict=True)]).any(0)
    squares_N = (truth[0] - honest[0]).square().sum(-1).flatten()
    kinds = {"noise_of_flipped": squares_N[flipped_N], "noise_of_others": squares_N[~flipped_N], "noise": squares_N}
    return {"flipped": float(flipped_N.float().mean())} | {
        name: float(values_N.mean().sqrt()) for name, values_N in kinds.items()
    }


def main():
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=STEPS)
    made.add_argument("--dtype", default="bfloat16", help="of the honest prover")
    options = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        random = measure(make_experts(Path(folder)), options.dtype)
        trained = train(Path(folder) / "trained", options.steps)
        trained |= measure(Path(folder) / "trained", options.dtype)
    for name, row in (("random", random), ("trained", trained)):
        note(f"{name}: {row['best']}, {row['ratio']:.1f} times the honest noise; {row['flipped']:.1%} flipped")
    figures = {"dtype": options.dtype, "nonces": NONCES, "draws": DRAWS, "random": random, "trained": trained}
    publish("hardened_experts", figures, options.output)


if __name__ == "__main__":
    main()
