"""``assay poc respond``."""

import os
import signal
import sys

import pytest

from assay.poc.responses import Receipts

ROUND = ["--block-hash", "block_alpha", "--public-key", "node_A"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt":[1,2,3],"request_id":"r1"}\n{"prompt":[4],"temperature":0,"max_tokens":3}\n'
    )
    return path


def test_receipts_are_written(told, refused, small_checkpoint, prompts, tmp_path):
    out = tmp_path / "receipts.jsonl"
    command = [
        "poc",
        "respond",
        "--model",
        small_checkpoint,
        "--prompts",
        prompts,
        *ROUND,
        "-o",
        out,
    ]
    sampling = [
        "--temperature",
        "0.7",
        "--top-k",
        "50",
        "--max-tokens",
        "6",
        "--user-seed",
        "u",
        "--hash-prompts",
    ]
    shown = told(*command, *sampling)
    made = Receipts.load(out)
    assert shown["schema"] == "assay.poc.respond/1"
    assert (shown["receipts"], shown["tokens"], shown["sha256"]) == (
        2,
        made.footer.tokens,
        made.footer.sha256,
    )
    first, second = made.receipts
    assert (first.request_id, first.chosen_by, first.user_seed) == ("r1", "client", "u")
    assert (first.sampling.temperature, first.sampling.top_k, len(first.output)) == (0.7, 50, 6)
    assert (second.request_id, second.chosen_by) == ("line-2", "server")
    assert (second.sampling.temperature, second.sampling.top_k, len(second.output)) == (0, 50, 3)
    assert first.prompt.ids is None
    assert "--overwrite" in refused(*command)


def test_an_example_runs_as_text(assay, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    out = tmp_path / "receipts.jsonl"
    prompts.write_text('{"prompt":"def add(a, b):"}\n')
    result = assay("poc", "respond", "--model", "reference:qwen3", "--prompts", prompts, *ROUND, "-o", out,
                   "--max-tokens", "2", "--device", "cpu")  # fmt: skip
    assert result.code == 0, result.err
    assert "receipts" in result.out
    assert Receipts.load(out).receipts[0].prompt.tokens == 7


@pytest.mark.parametrize(
    ("content", "flags", "seen"),
    [
        ('{"prompt":[9999]}\n', [], "token 9999"),
        ('{"prompt":[1]}\n', ["--max-tokens", "0"], "--max-tokens 0"),
        ('{"prompt":[1]}\n', ["--temperature", "-1"], "temperature is -1"),
        ('{"prompt":[1]}\n', ["--public-key", ""], "public_key is ''"),
        ('{"prompt":[1]}\n', ["--block-hash", "a\nb"], "block_hash is"),
        ('{"prompt":[1]}\n', ["--user-seed", "a\nb"], "user_seed is"),
        ('{"prompt":"text"}\n', [], "no tokenizer"),
        ('{"prompt":[1],"stop":"text"}\n', [], "no tokenizer"),
        (
            '{"messages":[{"role":"user","content":"a"}]}\n',
            [],
            "line-1': messages for CHECKPOINT without a chat template",
        ),
        ("", ["--prompts", "none.jsonl"], "none.jsonl"),
        ("", ["-o", "none/receipts.jsonl"], "create the directory"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_the_model_is_loaded(
    content, flags, seen, refused, small_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "assay.models.load.load_model", lambda *_, **__: pytest.fail("the model was loaded")
    )
    (tmp_path / "prompts.jsonl").write_text(content)
    command = [
        "poc",
        "respond",
        "--model",
        small_checkpoint,
        "--prompts",
        tmp_path / "prompts.jsonl",
        *ROUND,
    ]
    assert seen.replace("CHECKPOINT", str(small_checkpoint)) in refused(
        *command, "-o", tmp_path / "receipts.jsonl", *flags
    )
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_stopped_run_says_that_it_continues_and_does(
    assay, small_checkpoint, prompts, tmp_path, monkeypatch
):
    out = tmp_path / "receipts.jsonl"
    command = [
        "poc",
        "respond",
        "--model",
        small_checkpoint,
        "--prompts",
        prompts,
        *ROUND,
        "-o",
        out,
    ]
    receipts = []
    module = sys.modules["assay.poc.responses.answering"]
    make = module.Receipt

    def stop(**made):
        receipts.append(make(**made))
        os.kill(os.getpid(), signal.SIGTERM)
        return receipts[-1]

    with monkeypatch.context() as patched:
        patched.setattr(module, "Receipt", stop)
        stopped = assay(*command)
    assert stopped.code == 128 + signal.SIGTERM
    assert stopped.err.endswith("continues it\n")
    assert not out.exists()
    assert (
        len((tmp_path / "receipts.jsonl.partial").read_text().splitlines()) == 1
    )  # it was not written yet
    assert assay(*command).code == 0
    assert Receipts.load(out).receipts[0].line() == receipts[0].line()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "receipts.jsonl"]
