"""The test vectors of responses: ``python -m tests.poc.responses.vectors`` writes them anew.

``tests/vectors/responses.json`` has seeds, noise, tokens and sketches; ``responses.jsonl`` is a
file of receipts.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from assay import streams
from assay.poc import Fingerprint
from assay.poc.protocol.records import encode_vector
from assay.poc.responses import Prompt, Receipt, ReceiptHeader, Receipts, ResponseSeed, Sampling
from assay.poc.responses.prefill import sketch_response
from assay.poc.responses.sampling import counts_before, mark_tokens

FOLDER = Path(__file__).parents[2] / "vectors"
STEPS = [0, 1, 31, 32, 2**32 - 1]
DIGEST = "1f3870be274f6c49b3e31a0c6728957f1f3870be274f6c49b3e31a0c6728957f"
SEEDS = [
    ResponseSeed(
        user_seed="", request_id="r", public_key="node_A", digest=DIGEST, block_hash="block_alpha"
    ),
    ResponseSeed(
        user_seed="42",
        request_id="chatcmpl-1",
        public_key="node_A",
        digest=DIGEST,
        block_hash="b",
        index=3,
    ),
    ResponseSeed(
        user_seed="ключ é 🙂",
        request_id="0:2:x",
        public_key="K_é",
        digest="0" * 64,
        block_hash="00ff",
    ),
]
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=0),
    Sampling(top_k=3),
    Sampling(top_p=0.6),
    Sampling(min_p=0.2, temperature=1.7),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.25, presence_penalty=-0.5),
    Sampling(temperature=0, repetition_penalty=2.0, logit_bias={3: 1.5}),
    Sampling(
        temperature=0.8, top_k=6, top_p=0.9, min_p=0.03, repetition_penalty=1.1, frequency_penalty=0.1,
        presence_penalty=0.2, logit_bias={0: -2.5, 7: 100.0, 9: 0.1},
    ),
]  # fmt: skip
PROMPT = [1, 3, 3, 11]
OUTPUT = [9, 2, 2]
VOCABULARY = 12


def scores(
    logits, sampling: Sampling, seeds_N: np.ndarray, *, prompt_V=False, counts_NV=0
) -> np.ndarray:
    """The steps of docs/responses.md in numpy: s [N, V], or l at temperature 0; -inf where a token
    is not kept.
    """
    l_NV = np.array(logits, dtype=np.float32, ndmin=2)
    for token, bias in sampling.logit_bias.items():
        l_NV[:, token] += np.float32(bias)
    counts = np.asarray(counts_NV)
    repetition = np.float32(sampling.repetition_penalty)
    l_NV = np.where(
        (counts > 0) | prompt_V, np.where(l_NV > 0, l_NV / repetition, l_NV * repetition), l_NV
    )
    l_NV = l_NV - np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
    l_NV = l_NV - np.float32(sampling.presence_penalty) * (counts > 0).astype(np.float32)
    if sampling.greedy:
        return l_NV
    z_NV = l_NV / np.float32(sampling.temperature)
    kept_NV = z_NV > -np.inf
    if sampling.min_p > 0:
        kept_NV &= z_NV >= z_NV.max(axis=1, keepdims=True) + np.float32(math.log(sampling.min_p))
    if 0 < sampling.top_k < z_NV.shape[1]:
        descending_NV = -np.sort(-np.where(kept_NV, z_NV, -np.inf), axis=1)
        kept_NV &= z_NV >= descending_NV[:, sampling.top_k - 1, None]
    for z_V, kept_V in zip(z_NV, kept_NV, strict=True) if sampling.top_p < 1 else ():
        left = np.flatnonzero(kept_V)
        order = left[np.argsort(-z_V[left], kind="stable")]
        sums = np.cumsum(np.exp(z_V[order].astype(np.float64) - float(z_V[order[0]])))
        kept_V[order[1:][sums[:-1] >= sampling.top_p * sums[-1:]]] = (
            False  # those before it reach top_p together
        )
    noise_NV = streams.get_backend("numpy", "cpu").gumbels(
        np.asarray(seeds_N, np.uint32), z_NV.shape[1]
    )
    return np.where(kept_NV, z_NV, np.float32(-np.inf)) + np.asarray(noise_NV)


def numbers(values: np.ndarray) -> list[float | None]:
    """Float32 values as decimals that read back to the same bits; null for minus infinity."""
    return [None if value == -np.inf else float(value) for value in values]


def token_case(sampling: Sampling, step: int) -> dict[str, Any]:
    logits = np.random.default_rng(step).normal(0, 2, VOCABULARY).astype(np.float32)
    logits[[4, 7]] = logits[5], -np.inf  # a tie, and a token that a grammar forbids
    seeds = SEEDS[1].step_seeds([step])
    history = {
        "prompt_V": mark_tokens(PROMPT, VOCABULARY),
        "counts_NV": counts_before(OUTPUT, VOCABULARY, 3, 4),
    }
    found = scores(logits, sampling, seeds, **history)[0]
    return {
        "sampling": sampling.as_dict(),
        "seed": int(seeds[0]),
        "prompt": PROMPT,
        "output": OUTPUT,
        "logits": numbers(logits),
        "scores": numbers(found),
        "token": int(found.argmax()),
    }


def sketch_case(size: int) -> dict[str, Any]:
    state = np.random.default_rng(size).normal(0, 3, size).astype(np.float32)
    words = SEEDS[0].words("sketch")
    made = sketch_response(torch.from_numpy(state)[None], words, [32])
    return {"state": numbers(state), "step": 32, "sketch": encode_vector(made[0].numpy())}


def vectors() -> dict[str, Any]:
    """Everything that a second implementation has to give."""
    noise = np.asarray(streams.get_backend("numpy", "cpu").gumbels([0, 1, 2**31, 2**32 - 1], 8))
    return {
        "seeds": [
            {
                "user_seed": seed.user_seed,
                "request_id": seed.request_id,
                "public_key": seed.public_key,
                "digest": seed.digest,
                "block_hash": seed.block_hash,
                "index": seed.index,
                "text": seed.text(),
                "words": seed.words().tolist(),
                "sketch_words": seed.words("sketch").tolist(),
                "steps": STEPS,
                "step_seeds": seed.step_seeds(STEPS).tolist(),
            }
            for seed in SEEDS
        ],
        "noise": [
            {"seed": seed, "gumbels": numbers(row)}
            for seed, row in zip([0, 1, 2**31, 2**32 - 1], noise, strict=True)
        ],
        "tokens": [token_case(sampling, step) for step, sampling in enumerate(SAMPLINGS)],
        "sketches": [sketch_case(size) for size in (16, 33)],
    }


def receipts() -> Receipts:
    """A file with every kind of receipt."""
    states = np.random.default_rng(0).normal(0, 1, (2, 64)).astype(np.float32)
    of_two = sketch_response(torch.from_numpy(states), SEEDS[1].words("sketch"), [0, 32]).numpy()
    header = ReceiptHeader(
        public_key="node_A",
        reference="reference:example",
        digest=DIGEST,
        weights="trained",
        fingerprint=Fingerprint(
            engine="hf", device="example", dtype="bfloat16", attention="sdpa", batch_size=1, seq_len=64, threads=1,
            torch="2.13.0", library="transformers 5.17.0", kernels=("fused",),
        ),
    )  # fmt: skip
    common: dict[str, Any] = {"block_hash": "block_alpha"}
    made = [
        Receipt(
            **common, request_id="chatcmpl-1", chosen_by="client", index=3, user_seed="42", sampling=SAMPLINGS[-1],
            prompt=Prompt.of(PROMPT), output=tuple(range(33)), sketches=of_two, finish="length",
        ),
        Receipt(
            **common, request_id="chatcmpl-2", chosen_by="server", user_seed="ключ é", sampling=None,
            prompt=replace(Prompt.of([0, 2**24 - 1, 65536]), ids=None),
            output=(7, 2), sketches=of_two[:1], mask=True,
        ),
        Receipt(
            **common, request_id="chatcmpl-3", user_seed="", sampling=Sampling(temperature=0), prompt=Prompt.of([5]),
            output=(), sketches=of_two[:0], finish="abort",
        ),
    ]  # fmt: skip
    return Receipts.build(header, made, 1.25)


def main() -> None:
    """Write the vectors."""
    text = json.dumps(vectors(), ensure_ascii=False, indent=1)
    (FOLDER / "responses.json").write_text(text + "\n", encoding="utf-8")
    receipts().save(FOLDER / "responses.jsonl", overwrite=True)


if __name__ == "__main__":
    main()
