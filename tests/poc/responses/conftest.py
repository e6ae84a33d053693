"""Responses of the small model, and their file."""

from pathlib import Path

import pytest

from assay.poc.responses import Receipts, Request, Sampling, respond

REQUESTS = [
    Request(prompt=(3, 1, 4, 1, 5), request_id="plain", max_tokens=40),
    Request(
        prompt=(2, 7, 1, 8),
        request_id="all",
        user_seed="client é",
        sampling=Sampling(
            temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1, frequency_penalty=0.2,
            presence_penalty=-0.1, logit_bias={9: 2.5, 100: -1.0},
        ),
        max_tokens=33,
    ),
    Request(prompt=(2, 7, 1, 8), request_id="all", user_seed="client é", index=1, max_tokens=3, chosen_by="server"),
    Request(prompt=(6,), request_id="greedy", sampling=Sampling(temperature=0), max_tokens=5),
]  # fmt: skip


@pytest.fixture(scope="session")
def responses(small_model) -> Receipts:
    return respond(
        small_model, REQUESTS, block_hash="block_alpha", public_key="node_A", end_tokens=()
    )


@pytest.fixture
def lines(responses: Receipts, tmp_path: Path) -> list[str]:
    """The lines of a file of receipts."""
    responses.save(tmp_path / "good.jsonl")
    return (tmp_path / "good.jsonl").read_text(encoding="utf-8").splitlines()
