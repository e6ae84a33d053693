"""Replay of responses: what honest tokens and sketches look like, who is accused, and when 4-bit weights are caught.

Provers decode token by token in batches, in float32 and bfloat16, with several ways of sampling; verifiers read every
response at once, in both formats. The law of a pair of formats is fitted to half of the honest responses of a model.
The other half is audited: every audit draws whole responses with replacement, so that what tokens of a response share
stays together.

    python research/benchmarks/responses.py --save replays.npz
    python research/benchmarks/responses.py --load replays.npz -o research/results/responses.json --install
    python research/benchmarks/responses.py --save others.npz --block another --sources "poc/service/**/*.py"
    python research/benchmarks/responses.py --load others.npz -o research/results/responses_confirmed.json
"""

import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import note, parser, publish

import assay
from assay.files.jsonl import dumps
from assay.files.storage import write_atomic
from assay.poc import HFEngine, cheats
from assay.poc.protocol.pipelines import SKETCH_EVERY
from assay.poc.responses import HFPrefill, Prompt, Receipt, ReceiptHeader, Receipts, Replayed, Sampling, replay
from assay.poc.responses.calibration import DEFAULT_LAWS, MARGIN, fit_response_noise
from assay.poc.responses.prefill import sketch_response
from assay.poc.responses.sampler import Sampler
from assay.poc.verdict.noise import ResponseBlocks, ResponseTest

MODELS = ("reference:qwen3", "reference:llama")
DTYPES = ("float32", "bfloat16")
WAYS = {
    "temperature 1": Sampling(),
    "temperature 0.7, top-p 0.9": Sampling(temperature=0.7, top_p=0.9),
    "temperature 0.8, top-k 20, penalty": Sampling(temperature=0.8, top_k=20, repetition_penalty=1.1),
    "greedy": Sampling(temperature=0),
}
SHAPES = (16, 5)  # responses of a batch; the second one for part of the honest responses
PROMPT, TOKENS = 24, 64
LOOK = 8  # tokens between two looks at the e-value
AUDITS, RESPONSES = 2000, 32
ALPHA = 1e-3
SOURCE = Path(assay.__file__).parent


def prompts(tokenizer: Any, options: Any, count: int) -> list[tuple[int, ...]]:
    """Beginnings of equal length, from the sources of the package."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(SOURCE.glob(options.sources)))
    ids = tokenizer(text)["input_ids"]
    step = len(ids) // count
    return [tuple(ids[start * step : start * step + PROMPT]) for start in range(count)]


@torch.inference_mode()
def decoded(model: Any, header: ReceiptHeader, made: list[dict[str, Any]]) -> list[Receipt]:
    """The receipts of one batch that a server decodes with a cache."""
    seeds = [header.seed(Receipt(**one, output=(), sketches=np.zeros((0, 12), np.float16))) for one in made]
    words = np.stack([seed.step_seeds(range(TOKENS)) for seed in seeds])
    sampler = Sampler([one["sampling"] for one in made], model.vocab_size, model.device)
    inputs = torch.tensor([one["prompt"].ids for one in made])
    seen_BV = torch.zeros((len(made), model.vocab_size), dtype=torch.bool).scatter_(1, inputs, value=True)
    counts_BV = torch.zeros((len(made), model.vocab_size), dtype=torch.int32)
    head, states, tokens, cache = model.module.get_output_embeddings(), [], [], None
    hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][:, -1].float()))
    for step in range(TOKENS):
        output = model.module(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        scores = sampler.scores(output.logits[:, -1].float(), words[:, step], prompt_NV=seen_BV, counts_NV=counts_BV)
        inputs = scores.argmax(dim=1, keepdim=True)
        counts_BV.scatter_add_(1, inputs, torch.ones_like(inputs, dtype=torch.int32))
        tokens.append(inputs)
    hook.remove()
    output_BN, hidden_BSD = torch.cat(tokens, dim=1), torch.stack(states[::SKETCH_EVERY], dim=1)
    return [
        Receipt(
            **one,
            output=tuple(output_BN[row].tolist()),
            sketches=sketch_response(
                hidden_BSD[row], seeds[row].words("sketch"), range(0, TOKENS, SKETCH_EVERY)
            ).numpy(),
            finish="length",
        )
        for row, one in enumerate(made)
    ]


def served(model: Any, claimed: Any, name: str, count: int, batch: int, options: Any) -> Receipts:
    """The receipts of a node that runs one model and claims another."""
    fingerprint = HFEngine(model, batch_size=batch, seq_len=PROMPT + TOKENS).fingerprint
    header = ReceiptHeader(
        public_key=name,
        reference=claimed.reference,
        digest=claimed.digest,
        weights=claimed.weights,
        fingerprint=fingerprint,
    )
    made = [
        {
            "request_id": f"{way} {place}",
            "user_seed": "",
            "block_hash": options.block,
            "sampling": sampling,
            "prompt": Prompt.of(prompt),
        }
        for way, sampling in WAYS.items()
        for place, prompt in enumerate(prompts(model.tokenizer, options, count))
    ]
    batches = [made[start : start + batch] for start in range(0, len(made), batch)]
    return Receipts.build(header, [one for some in batches for one in decoded(model, header, some)], 0.0)


def measured(options: Any) -> dict[str, np.ndarray]:
    """Replays of every prover by every verifier, as arrays by name."""
    found: dict[str, np.ndarray] = {}
    for reference in options.models:
        models = {dtype: assay.load_model(reference, dtype=dtype, device="cpu") for dtype in DTYPES}
        provers = [(f"honest {dtype}", models[dtype], options.count, SHAPES[0]) for dtype in DTYPES]
        provers += [("honest bfloat16", models["bfloat16"], SHAPES[1], SHAPES[1])]
        provers += [(f"int4 {dtype}", cheats.rounded(models[dtype], 4), options.count, SHAPES[0]) for dtype in DTYPES]
        for name, prover, count, batch in provers:
            begun = time.perf_counter()
            receipts = served(prover, models["float32"], f"{name} {batch}", count, batch, options)
            note(f"{reference} {name} {batch}: {len(receipts.receipts)} responses, {time.perf_counter() - begun:.0f} s")
            for dtype, verifier in models.items():
                begun = time.perf_counter()
                replays = replay(receipts, verifier, engine=HFPrefill(verifier, batch_size=16))
                seconds = time.perf_counter() - begun
                key = f"{reference}|{name}|{batch}|{dtype}"
                found[f"{key}|margins"] = np.stack([one.margins for one in replays])
                found[f"{key}|profiles"] = np.stack([one.profiles for one in replays]).astype(np.float16)
                found[f"{key}|residuals"] = np.stack([one.residuals for one in replays])
                found[f"{key}|ways"] = np.array([one.receipt.request_id.rpartition(" ")[0] for one in replays])
                note(f"  by {dtype}: {np.mean(found[f'{key}|margins'] == 0):.2%} match, {seconds:.0f} s")
    return found


class Half:
    """Responses of one kind of prover before one verifier: every path that their values add to the tests."""

    def __init__(self, replays: list[Replayed], test: ResponseTest) -> None:
        every = range(LOOK, TOKENS + 1, LOOK)
        seen = [1 + (step - 1) // SKETCH_EVERY for step in every]
        self.tokens_RNK = np.stack([test.tokens.paths(one.profiles, every) for one in replays])
        self.sketches_RNK = np.stack([test.sketches.paths(one.residuals, seen) for one in replays])
        self._test = test

    def audits(self, count: int, responses: int, seed: int) -> dict[str, np.ndarray]:
        """The logarithms of the e-values at every look of audits of whole responses, drawn with replacement."""
        drawn = np.random.default_rng(seed).integers(len(self.tokens_RNK), size=(count, responses))
        found = {}
        for name, test, paths in (
            ("tokens", self._test.tokens, self.tokens_RNK),
            ("sketches", self._test.sketches, self.sketches_RNK),
        ):
            logs = np.empty((count, responses * paths.shape[1]))
            for row, chosen in enumerate(drawn):
                before = np.vstack([np.zeros(paths.shape[2]), paths[chosen, -1].cumsum(axis=0)[:-1]])
                logs[row] = test.log_e(before[:, None, :] + paths[chosen]).ravel()
            found[name] = logs
        found["both"] = np.logaddexp(found["tokens"], found["sketches"]) - math.log(2)
        return found


def replays_of(found: Any, reference: str, kind: str, dtype: str, verifier: str) -> list[list[Replayed]]:
    """The replays of every prover of a kind and dtype, rebuilt from the arrays."""
    made = []
    for key in sorted(found.files):
        model, name, _, by, what = key.split("|")
        if (model, name, by, what) == (reference, f"{kind} {dtype}", verifier, "margins"):
            arrays = [found[key.replace("margins", part)] for part in ("margins", "profiles", "residuals", "ways")]
            rows = zip(*arrays, strict=True)
            made.append([Replayed(str(way), m, p.astype(np.float64), r) for m, p, r, way in rows])  # type: ignore[arg-type]
    return made


def first(logs: np.ndarray) -> np.ndarray:
    """The number of tokens after which each audit accuses, infinite where it does not."""
    passed = logs >= -math.log(ALPHA)
    return np.where(passed.any(axis=1), LOOK * (passed.argmax(axis=1) + 1.0), math.inf)


def figures(found: Any, reference: str, dtype: str, verifier: str) -> dict[str, Any]:
    """What one pair of formats shows on one model."""
    provers = replays_of(found, reference, "honest", dtype, verifier)
    cheat = [one for replays in replays_of(found, reference, "int4", dtype, verifier) for one in replays]
    noise = fit_response_noise([replays[::2] for replays in provers], "benchmark")
    test = ResponseTest(noise, alpha=ALPHA)
    honest = [one for replays in provers for one in replays]
    accused = Half([one for replays in provers for one in replays[1::2]], test).audits(AUDITS, RESPONSES, 0)
    caught = Half(cheat, test).audits(AUDITS // 2, RESPONSES // 4, 1)
    verdicts = ResponseTest(noise, alpha=ALPHA)
    for one in (one for replays in provers for one in replays[1::2]):
        verdicts.update(ResponseBlocks.whole(one.residuals, one.profiles))
    values: dict[str, Any] = {
        "model": reference,
        "prover": dtype,
        "verifier": verifier,
        "responses": len(honest),
        "matching": share(honest),
        "largest_honest_margin": max(float(one.margins[np.isfinite(one.margins)].max()) for one in honest),
        "difference_of_logits": noise.tokens.law.size,
        "between_responses": [noise.tokens.between, noise.sketches.between],
        "tokens_effect": noise.tokens.effect,
        "sketch_distance": noise.sketches.law.size,
        "audits": AUDITS,
        "tokens_of_audit": RESPONSES * TOKENS,
        "accused": {name: float(np.mean(np.isfinite(first(logs)))) for name, logs in accused.items()},
        "largest_log_e": {name: float(logs.max()) for name, logs in accused.items()},
        "audit_half": verdicts.result.verdict,
        "int4_matching": share(cheat),
        "int4_sketch_distance": float(np.median(np.concatenate([one.residuals for one in cheat]))),
    }
    for name, logs in caught.items():
        when = first(logs)
        values[f"int4_{name}"] = {
            "median": quantile(when, 0.5),
            "99%": quantile(when, 0.99),
            "within_64": float(np.mean(when <= 64)),
            "within_300": float(np.mean(when <= 300)),
        }
    values["ways"] = ways(honest, cheat, test)
    return values


def quantile(when: np.ndarray, share: float) -> float | None:
    """A quantile of numbers of tokens; None where so many audits did not accuse."""
    found = float(np.sort(when)[math.ceil(share * len(when)) - 1])
    return found if math.isfinite(found) else None


def share(replays: list[Replayed]) -> float:
    """The share of tokens that are the verifier's own."""
    return float(np.mean(np.concatenate([one.margins for one in replays]) == 0))


def ways(honest: list[Replayed], cheat: list[Replayed], test: ResponseTest) -> list[dict[str, Any]]:
    """Matching tokens, and evidence of each 4-bit token, by the way of sampling."""
    rows = []
    for way in WAYS:
        own = [one for one in cheat if one.receipt == way]
        logs = [float(test.tokens.log_e(test.tokens.paths(one.profiles, [TOKENS])[0])) for one in own]
        found = Half(own, test).audits(AUDITS // 4, RESPONSES // 2, 2)
        when = first(found["tokens"])
        rows.append(
            {
                "way": way,
                "matching": share([one for one in honest if one.receipt == way]),
                "int4_matching": share(own),
                "int4_nats_of_64_tokens": float(np.mean(logs)),
                "int4_tokens_median": quantile(when, 0.5),
                "int4_tokens_99%": quantile(when, 0.99),
            }
        )
    return rows


def defaults(found: Any) -> dict[str, Any]:
    """The stated default of every pair of formats: both models together, and a margin."""
    laws = {}
    for one, other in itertools.combinations_with_replacement(sorted(DTYPES), 2):
        pairs = {(one, other), (other, one)}
        provers = [
            replays
            for reference in MODELS
            for dtype, verifier in sorted(pairs)
            for replays in replays_of(found, reference, "honest", dtype, verifier)
        ]
        laws[f"{one}/{other}"] = fit_response_noise(provers, "default").scaled(MARGIN).as_dict()
    return {"margin": MARGIN, "laws": laws}


class Several:
    """The arrays of several files under one roof."""

    def __init__(self, paths: list[Path]) -> None:
        self._arrays = {name: array for path in paths for name, array in np.load(path).items()}
        self.files = list(self._arrays)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--save", type=Path, help="measure, and write the replays there")
    arguments.add_argument("--load", type=Path, nargs="+", help="replays that were saved")
    arguments.add_argument("--models", nargs="+", default=MODELS)
    arguments.add_argument("--count", type=int, default=32, help="prompts of each way of sampling")
    arguments.add_argument("--block", default="block", help="block that seeds the responses")
    arguments.add_argument("--sources", default="poc/protocol/*.py", help="files whose text the prompts are cut from")
    arguments.add_argument("--install", action="store_true", help="write the stated defaults of the package")
    options = arguments.parse_args()
    if options.save:
        np.savez_compressed(options.save, **measured(options))
    if options.load:
        replays = Several(options.load)
        if options.install:
            write_atomic(DEFAULT_LAWS, dumps(defaults(replays)) + "\n")
        rows = []
        for reference, dtype, verifier in itertools.product(options.models, DTYPES, DTYPES):
            rows.append(figures(replays, reference, dtype, verifier))
            note(f"{reference} {dtype} {verifier}: accused {rows[-1]['accused']}")
        publish("responses", {"alpha": ALPHA, "pairs": rows}, options.output)
