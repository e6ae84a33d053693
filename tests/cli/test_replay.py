"""``assay poc replay`` and ``calibrate-responses``: exit codes, what is refused, and the ledger."""

import json
from dataclasses import replace

import pytest

from assay.models import load_model
from assay.poc.responses import Receipts, read_requests, respond
from assay.poc.responses.adapters import load_adapter
from assay.poc.responses.receipts import Adapter
from tests.lora import write_adapter

MODEL = ("--model", "reference:qwen3", "--device", "cpu")
KNOWN = ("--block-hash", "block_alpha", "--public-key", "node_A")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / "prompts.jsonl"
    lines = [
        {
            "prompt": [5 + number, 9, 12, 40],
            "request_id": f"r{number}",
            "max_tokens": 36,
            "user_seed": "mine",
        }
        for number in range(8)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def receipts(prompts):
    path = prompts.with_name("receipts.jsonl")
    model = load_model("reference:qwen3", dtype="float32", device="cpu")
    respond(
        model,
        read_requests(prompts),
        block_hash="block_alpha",
        public_key="node_A",
        end_tokens=(),
        output=path,
    )
    return path


def test_an_honest_node_is_replayed_and_its_life_is_kept(assay, receipts, prompts, tmp_path):
    ledger = tmp_path / "ledger.sqlite3"
    pinned = (*KNOWN, "--requests", prompts, "--ledger", ledger)
    result = assay("poc", "replay", receipts, *MODEL, *pinned, "--json")
    found = json.loads(result.out)
    assert found["verdict"] in ("honest", "undecided")
    assert result.code == (0 if found["life"]["verdict"] == "honest" else 2)
    assert (found["schema"], found["matches"], found["unpinned"]) == (
        "assay.poc.replay/1",
        8 * 36,
        [],
    )
    assert found["life"]["audits"] == 8
    assert found["life"]["n"] == 16  # blocks of 32 tokens
    assert assay("poc", "ledger", "audit", ledger).code == 0
    again = json.loads(assay("poc", "replay", receipts, *MODEL, *pinned, "--json").out)
    assert (again["life"]["n"], again["life"]["audits"]) == (16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [{}, {"output": (), "sketches": (), "finish": "abort"}])
def test_answers_that_are_not_shown_cost_exit_code_zero(
    assay, told, receipts, prompts, tmp_path, kept
):
    """Otherwise a node would show the answers that it computed honestly, and no others."""
    whole = Receipts.load(receipts)
    hidden = [replace(one, **kept) for one in whole.receipts[6:]] if kept else []
    path = tmp_path / "some.jsonl"
    Receipts.build(whole.header, [*whole.receipts[:6], *hidden], 1.0).save(path)
    flags = (*KNOWN, "--requests", prompts)
    found = assay("poc", "replay", path, *MODEL, *flags, "--alpha", "0.01", "--json")
    assert (found.code, json.loads(found.out)["unanswered"]) == (2, 2)
    shown = assay("poc", "replay", path, *MODEL, *flags, "--ledger", tmp_path / "ledger.sqlite3")
    assert shown.code == 2
    assert "requests unanswered" in shown.out
    assert told("poc", "replay", receipts, *MODEL, *flags)["unanswered"] == 0


def test_an_answer_that_was_cut_and_claims_stop_is_refused(
    assay, refused, receipts, prompts, tmp_path
):
    """Whatever it is replayed with; only where the client asked for such an end is it one."""
    whole = Receipts.load(receipts)
    path = tmp_path / "cut.jsonl"
    asked = tmp_path / "asked.jsonl"
    cut = [
        replace(one, output=one.output[:4], sketches=one.sketches[:1], finish="stop")
        for one in whole.receipts
    ]
    Receipts.build(whole.header, [*whole.receipts[:-1], cut[-1]], 1.0).save(path)
    flags = (*MODEL, *KNOWN, "--sample", "1", "--seed", "1", "--requests")
    assert "'r7' ended by stop after 4 tokens" in refused("poc", "replay", path, *flags, prompts)
    lines = [
        json.loads(line) | {"stop_token_ids": [cut[-1].output[-1]]}
        for line in prompts.read_text().splitlines()
    ]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (
        assay("poc", "replay", path, *flags, asked, "--json").code == 2
    )  # undecided: one response of 36 tokens


def test_what_nothing_pins_is_shown_and_the_exit_code_is_two(
    assay, refused, receipts, prompts, tmp_path
):
    result = assay("poc", "replay", receipts, *MODEL, "--sample", "2", "--seed", "1")
    assert result.code == 2
    assert "block_hash, public_key, requests" in result.out
    assert "72 of 72" in result.out
    said = refused("poc", "replay", receipts, *MODEL, "--ledger", tmp_path / "ledger.sqlite3")
    assert "taken on the prover's word" in said
    whole = Receipts.load(receipts)
    masked = [replace(receipt, mask=True) for receipt in whole.receipts]
    path = tmp_path / "masked.jsonl"
    Receipts.build(whole.header, masked, 1.0).save(path)
    ledger = ("--ledger", tmp_path / "ledger.sqlite3")
    said = refused("poc", "replay", path, *MODEL, *KNOWN, "--requests", prompts, *ledger)
    assert "tokens taken on the prover's word" in said
    assert "--set evidence=" in said


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--block-hash", "block_beta"), "block_hash"),
        (("--public-key", "node_B"), "public_key"),
        (("--prover-dtype", "bfloat16"), "prover_dtype"),
        (("--sample", "9"), "--sample"),
    ],
)
def test_another_value_fails_by_name_before_a_model_is_loaded(refused, receipts, flags, name):
    assert name in refused("poc", "replay", receipts, "--model", "no/such", *flags)


def test_a_replay_that_is_refused_begins_no_ledger(
    refused, receipts, prompts, small_checkpoint, tmp_path
):
    whole, strange, other, ledger = (
        Receipts.load(receipts),
        *(tmp_path / name for name in ("strange", "other", "l")),
    )
    outside = [replace(one, output=(*one.output[:-1], 10**6)) for one in whole.receipts]
    Receipts.build(whole.header, outside, 1.0).save(strange)
    other.write_text(prompts.read_text().replace('"mine"', '"thine"'))
    for path, model, asked, seen in (
        (receipts, (*MODEL, "--dtype", "float16"), prompts, "no law of honest noise of responses"),
        (
            receipts,
            ("--model", small_checkpoint, "--device", "cpu"),
            prompts,
            "receipts of reference:qwen3",
        ),
        (strange, MODEL, prompts, "with token 1000000 and 40 positions"),
        (receipts, MODEL, other, "index ('mine', 'r0', 0)"),
    ):
        assert seen in refused(
            "poc", "replay", path, *model, *KNOWN, "--requests", asked, "--ledger", ledger
        )
    assert not ledger.exists()


def test_noise_is_calibrated_and_used(assay, told, refused, receipts, prompts, tmp_path):
    output = tmp_path / "responses.json"
    assert told("poc", "calibrate-responses", receipts, *MODEL, "-o", output)["matching"] == 1.0
    flags = (*KNOWN, "--requests", prompts, "--calibration", output)
    found = json.loads(assay("poc", "replay", receipts, *MODEL, *flags, "--json").out)
    assert found["noise"]["source"].startswith("calibration on 8 responses")
    assert "dtype than the verifier's" in refused(
        "poc", "replay", receipts, *MODEL, *flags, "--dtype", "bfloat16"
    )


def test_what_cannot_be_calibrated_is_refused_before_the_replay(
    refused, receipts, tmp_path, monkeypatch
):
    monkeypatch.setattr("assay.poc.responses.replay", None)
    read = Receipts.load(receipts)
    tuned = tmp_path / "tuned.jsonl"
    other = tmp_path / "other.jsonl"
    output = tmp_path / "responses.json"
    named = [replace(one, adapter=Adapter("tuned", "0" * 64)) for one in read.receipts]
    Receipts.build(replace(read.header, public_key="another"), named, 1.0).save(tuned)
    Receipts.build(replace(read.header, digest="0" * 64), read.receipts, 1.0).save(other)
    for files, model, path, wrong in (
        ([receipts], "no/such", tmp_path / "none" / "c.json", "create the directory"),
        ([receipts, tuned], "no/such", output, "'tuned'"),
        ([receipts, other], "no/such", output, "0" * 12),
        ([other], "reference:qwen3", output, "0" * 12),
    ):
        assert wrong in refused(
            "poc", "calibrate-responses", *files, "--model", model, "--device", "cpu", "-o", path
        )
    assert not output.exists()


@pytest.mark.slow
def test_receipts_of_an_adapter_need_it_and_are_replayed_with_it(
    assay, refused, prompts, tmp_path, monkeypatch
):
    model = load_model("reference:qwen3", dtype="float32", device="cpu")
    directory = write_adapter(tmp_path / "adapter", model)
    adapter = load_adapter(directory)
    with adapter.on(model):
        made = respond(
            model,
            read_requests(prompts),
            block_hash="block_alpha",
            public_key="node_A",
            end_tokens=(),
        )
    named = [replace(one, adapter=Adapter("tuned", adapter.digest)) for one in made.receipts]
    path = tmp_path / "tuned.jsonl"
    Receipts.build(made.header, named, 1.0).save(path)
    said = refused("poc", "replay", path, "--model", "no/such")
    assert all(words in said for words in ("'tuned'", "--lora"))
    lines = [json.loads(line) | {"adapter": "tuned"} for line in prompts.read_text().splitlines()]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = assay(
        "poc", "replay", path, *MODEL, *KNOWN, "--requests", asked, "--lora", directory, "--json"
    )
    assert json.loads(found.out)["matches"] == 8 * 36
    monkeypatch.setattr("assay.poc.launch.check_installed", str)
    assert "--engine hf" in refused(
        "poc", "replay", path, *MODEL[:2], "--lora", directory, "--engine", "vllm"
    )
