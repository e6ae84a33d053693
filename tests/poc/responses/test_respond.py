"""The reference loop: what it draws, where it stops, and what an interruption leaves."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from assay.errors import BadWeights, ModelError, ProofFormatError, UsageError
from assay.models import Model, load_model
from assay.poc.protocol.transforms import unit
from assay.poc.responses import Receipts, Request, Sampling, respond
from assay.poc.responses.prefill import sketch_response
from assay.poc.responses.sampling import counts_before, mark_tokens
from tests.poc.responses.conftest import REQUESTS
from tests.poc.responses.vectors import scores
from tests.wordings import refuses

COMMON = {"block_hash": "block_alpha", "public_key": "node_A"}


def replayed(model: Model, made: Receipts, place: int) -> tuple[np.ndarray, torch.Tensor]:
    """Scores [N, V] of a response by one pass without a cache, with the definition in numpy, and
    its states [N, D].
    """
    receipt = made.receipts[place]
    with torch.inference_mode():
        ids = torch.tensor([[*receipt.prompt.ids, *receipt.output]])
        out = model.module(ids, output_hidden_states=True)
    first = len(receipt.prompt.ids) - 1
    count = len(receipt.output)
    logits = out.logits[0, first : first + count].float().numpy()
    seeds = made.header.seed(receipt).step_seeds(range(count))
    history = {
        "prompt_V": mark_tokens(receipt.prompt.ids, 512),
        "counts_NV": counts_before(receipt.output, 512, 0, count),
    }
    return scores(logits, receipt.sampling, seeds, **history), out.hidden_states[-1][
        0, first : first + count
    ]


@pytest.mark.parametrize("place", range(len(REQUESTS)))
def test_one_prefill_gives_the_tokens_again(place: int, small_model, responses: Receipts):
    found, states = replayed(small_model, responses, place)
    receipt = responses.receipts[place]
    assert tuple(found.argmax(axis=1).tolist()) == receipt.output
    steps = range(0, len(receipt.output), 32)
    again = sketch_response(
        states[list(steps)], responses.header.seed(receipt).words("sketch"), steps
    )
    assert np.abs(again.numpy().astype(float) - receipt.sketches).max() < 1e-3
    lengths = torch.linalg.vector_norm(torch.from_numpy(receipt.sketches.astype(np.float32)), dim=1)
    np.testing.assert_allclose(lengths.numpy(), 1, atol=2e-3)


def test_sketches_are_the_projection_that_the_page_defines(responses: Receipts, small_model):
    from assay import streams

    receipt = responses.receipts[0]
    seed = responses.header.seed(receipt)
    _, states = replayed(small_model, responses, 0)
    normals = np.asarray(
        streams.get_backend("numpy", "cpu").normals(seed.step_seeds([32], "sketch"), 12 * 64)
    )
    wanted = unit(torch.from_numpy(normals.reshape(12, 64).copy()) @ unit(states[32].float()))
    np.testing.assert_allclose(receipt.sketches[1].astype(float), wanted.numpy(), atol=1e-3)


def test_a_response_does_not_depend_on_the_others(small_model, responses: Receipts):
    alone = respond(small_model, [REQUESTS[1]], **COMMON, end_tokens=())
    assert alone.receipts[0].line() == responses.receipts[1].line()
    backwards = respond(small_model, REQUESTS[::-1], **COMMON, end_tokens=())
    assert [r.line() for r in backwards.receipts[::-1]] == [r.line() for r in responses.receipts]


def test_prompts_of_text_or_ids_get_names(small_model):
    made = respond(
        small_model, [[1, 2], [3]], **COMMON, max_tokens=2, user_seed="u", hash_prompts=True
    )
    assert [receipt.request_id for receipt in made.receipts] == ["prompt-0", "prompt-1"]
    assert {receipt.chosen_by for receipt in made.receipts} == {"server"}
    assert all(receipt.prompt.ids is None for receipt in made.receipts)
    assert made.receipts[0].user_seed == "u"


def test_progress_counts_tokens(small_model):
    seen: list[tuple[int, int]] = []
    output = respond(small_model, REQUESTS[:1], **COMMON, end_tokens=()).receipts[0].output
    told = {"progress": lambda *state: seen.append(state)}
    made = respond(small_model, REQUESTS[::3], **COMMON, end_tokens=[output[9]], **told).receipts[0]
    tokens = output.index(output[9]) + 1
    assert (made.output, made.finish) == (output[:tokens], "stop")
    assert seen[:tokens] == [(i + 1, 45) for i in range(tokens)]
    assert seen[-1][0] <= seen[-1][1] == tokens + 5


def test_an_interrupted_run_continues(small_model, responses: Receipts, tmp_path: Path):
    path = tmp_path / "receipts.jsonl"

    def stop_at(limit: int):
        def progress(done: int, total: int) -> None:
            if done == limit:
                raise KeyboardInterrupt

        return progress

    for limit in (20, 60, 75):  # in the first response, in the second, in the third
        with pytest.raises(KeyboardInterrupt):
            respond(
                small_model, REQUESTS, **COMMON, end_tokens=(), output=path, progress=stop_at(limit)
            )
        assert not path.exists()
    assert (
        len((tmp_path / "receipts.jsonl.partial").read_text().splitlines()) == 3
    )  # header and two receipts
    seen: list[int] = []
    made = respond(
        small_model,
        REQUESTS,
        **COMMON,
        end_tokens=(),
        output=path,
        progress=lambda done, total: seen.append(done),
    )
    assert seen == list(range(74, 82))
    assert [r.line() for r in made.receipts] == [r.line() for r in responses.receipts]
    assert Receipts.load(path).footer == made.footer
    assert not (tmp_path / "receipts.jsonl.partial").exists()


def test_another_run_s_partial_file_is_refused(small_model, tmp_path: Path):
    path = tmp_path / "receipts.jsonl"
    made = respond(small_model, REQUESTS[3:], **COMMON, output=path)
    lines = path.read_text().splitlines(keepends=True)
    (tmp_path / "receipts.jsonl.partial").write_text("".join(lines[:2]))
    other = replace(REQUESTS[3], sampling=Sampling(temperature=0.5))
    for requests, common in (
        ([other], COMMON),
        (REQUESTS[3:], COMMON | {"block_hash": "x"}),
        (REQUESTS[:1], COMMON),
    ):
        with refuses(UsageError, "another run s partial file is refused"):
            respond(small_model, requests, **common, output=path, overwrite=True)
    (tmp_path / "receipts.jsonl.partial").write_text('{"kind":"assay.poc.proof"}\n{"nonce":0}\n')
    with refuses(UsageError, "another run s partial file is refused"):
        respond(small_model, REQUESTS[3:], **COMMON, output=path, overwrite=True)
    (tmp_path / "receipts.jsonl.partial").write_text(
        lines[0] + lines[1].replace('"output":[', '"output":[-1,')
    )
    with refuses(ProofFormatError, "another run s partial file is refused, 2") as refused:
        respond(small_model, REQUESTS[3:], **COMMON, output=path, overwrite=True)
    assert "receipts.jsonl.partial, line 2" in refused.value.seen
    (tmp_path / "receipts.jsonl.partial").write_text("".join(lines))  # ended before it got its name
    again = respond(small_model, REQUESTS[3:], **COMMON, output=path, overwrite=True)
    assert again.receipts[0].line() == made.receipts[0].line()


def test_what_cannot_be_answered_is_refused_before_the_first_token(small_model, tmp_path: Path):
    path = tmp_path / "receipts.jsonl"

    def never(done: int, total: int) -> None:
        raise AssertionError

    good = REQUESTS[0]
    for requests, common, match in (
        ([], COMMON, "no prompts"),
        ([good, replace(good, prompt=(512,), request_id="b")], COMMON, "token 512"),
        (
            [good, replace(good, max_tokens=124, request_id="b")],
            COMMON,
            "5 tokens and asks for 124",
        ),
        ([good], COMMON | {"block_hash": ""}, "block_hash"),
        ([good], COMMON | {"public_key": "\n"}, "public_key"),
        ([good, good], COMMON, "two requests"),
        (["text"], COMMON, "no tokenizer"),
        ("text", COMMON, "one prompt"),
    ):
        with pytest.raises(UsageError, match=match):
            respond(small_model, requests, **common, output=path, progress=never)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_may_fill_the_model_s_positions(small_model):
    made = respond(
        small_model,
        [Request(prompt=(1,) * 126, request_id="r", max_tokens=2)],
        **COMMON,
        end_tokens=(),
    )
    assert len(made.receipts[0].output) == 2


def test_a_head_of_more_rows_than_the_tokenizer_has(small_model):
    """Rows that pad a head to a round number may be drawn like any other; a receipt names them."""
    bias = dict.fromkeys((510, 511), 100.0)
    made = respond(
        small_model, [Request(prompt=(1,), request_id="r", sampling=Sampling(logit_bias=bias), max_tokens=4)],
        **COMMON, end_tokens=(),
    )  # fmt: skip
    assert set(made.receipts[0].output) <= {510, 511}


def test_broken_weights_are_named(small_checkpoint: Path):
    model = load_model(small_checkpoint, dtype="float32", device="cpu")
    with torch.no_grad():
        model.module.model.norm.weight[3] = torch.nan
    with refuses(BadWeights, "broken weights are named"):
        respond(model, [[1, 2]], **COMMON)


def test_a_model_without_a_cache_is_named(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_model(small_checkpoint, dtype="float32", device="cpu")
    monkeypatch.setitem(vars(model.module), "forward", lambda **inputs: 1 / 0)
    with refuses(ModelError, "a model without a cache is named"):
        respond(model, [[1, 2]], **COMMON)
