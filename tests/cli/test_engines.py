"""The flags of ``assay poc prove`` that say how the engine runs."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from assay.errors import UsageError
from assay.models import load_model
from assay.poc import Proof
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.engines.names import ENGINES
from assay.poc.launch import Launch, open_prefill

CACHED = "bfloat16+fp8_e4m3-cache"


@pytest.fixture
def command(proving):
    """Words that prove again and again, with more flags."""
    return lambda *flags, **changed: proving("proof.jsonl", "--overwrite", *flags, **changed)


@pytest.fixture
def prove(told, command):
    """Run them; give what is told."""
    return lambda *flags, **batch: told(*command(*flags, **batch))


def test_the_first_batch_is_reported_apart(prove):
    made = prove()
    assert 0 < made["first_batch_seconds"] <= made["seconds"] + 0.001
    assert made["nonces_per_second"] > 0


def test_a_resumed_proof_says_what_was_left_and_how_fast_the_rest_was(prove, tmp_path):
    path = tmp_path / "proof.jsonl"
    assert prove(batch_size=4)["resumed"] == 0
    header, *records = path.read_text().splitlines()[:-1]
    path.with_name("proof.jsonl.partial").write_text("\n".join([header, *records[:20]]) + "\n")
    made = prove(batch_size=4)
    assert (made["records"], made["resumed"]) == (24, 20)
    batch = made["nonces_per_second"] * (made["first_batch_seconds"] - 0.0005)  # which is rounded
    assert batch < 4.1, "four were proved, and not 24"
    path.with_name("proof.jsonl.partial").write_text("\n".join([header, *records]) + "\n")
    assert prove(batch_size=4)["nonces_per_second"] == 0


def test_the_batch_size_can_be_left_to_the_machine(prove, refused, command, tmp_path):
    prove(batch_size="auto")
    assert Proof.load(tmp_path / "proof.jsonl").header.fingerprint.batch_size in {
        2**n for n in range(10)
    }
    for wrong in ("many", "-1", "0", "1.5"):
        assert "batch" in refused(*command(batch_size=wrong))


def test_kernels_are_chosen_by_a_flag(prove, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    libraries = {}
    for kernels in ("auto", "eager", "compiled"):
        prove("--kernels", kernels)
        libraries[kernels] = Proof.load(tmp_path / "proof.jsonl").header.fingerprint.as_dict()[
            "library"
        ]
    assert libraries["auto"] == libraries["eager"]
    assert libraries["compiled"] == f"{libraries['eager']}, compiled whole"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--kernels", "quick"), "`kernels` quick"),
        (("--engine", "VLLM"), "did you mean --engine vllm?"),
        (("--engine", "vllm", "--deterministic"), "`deterministic` with --engine vllm"),
        (("--engine", "vllm", "--dtype", "float8"), "--dtype float8 with --engine vllm"),
        (("--engine", "vllm", "--preset", "layer-signs"), "preset layer-signs on the vllm engine"),
        (("--dtype", "int4"), "--dtype int4"),
        (("--dtype", "bfloat"), "did you mean --dtype bfloat16?"),
    ],
)
def test_what_makes_no_sense_is_refused(flags, words, refused, command):
    assert words in refused(*command(*flags))


def test_a_proof_that_vllm_cannot_recompute_is_refused_before_it_starts(
    refused, prove, tmp_path, monkeypatch
):
    monkeypatch.setattr("assay.poc.launch.vllm_engine", lambda *_, **__: pytest.fail("vLLM starts"))
    prove("--preset", "layer-signs")
    flags = (
        "--block-hash",
        "b",
        "--public-key",
        "k",
        "--preset",
        "layer-signs",
        "--seq-len",
        16,
        "--engine",
        "vllm",
    )
    said = refused("poc", "verify", tmp_path / "proof.jsonl", "--model", "reference:qwen3", *flags)
    assert "preset layer-signs on the vllm engine" in said
    assert "--engine hf" in said


def test_a_proof_that_is_longer_than_the_model_is_refused_before_a_ledger_is_begun(
    refused, prove, small_checkpoint, tmp_path, monkeypatch
):
    prove("--model", "reference:qwen3", "--seq-len", 200)
    proof = tmp_path / "proof.jsonl"
    ledger = tmp_path / "ledger.sqlite3"
    flags = (
        "--block-hash",
        "b",
        "--public-key",
        "k",
        "--nonces",
        "0:24",
        "--seq-len",
        200,
        "--ledger",
        ledger,
    )
    monkeypatch.setattr("assay.models.load.digest_tensors", None)  # weights are read
    monkeypatch.setattr("assay.poc.launch.check_installed", str)
    for engine in ("hf", "vllm"):
        said = refused(
            "poc", "verify", proof, "--model", small_checkpoint, *flags, "--engine", engine
        )
        assert "a proof of 200 positions\n  wanted: at most the 128 of" in said
    assert not ledger.exists()


@pytest.mark.parametrize(
    ("stated", "flags", "loads", "words"),
    [
        ("float64", (), False, "a proof in the number format 'float64'"),
        ("float8", ("--prover-dtype", "float8"), False, "no law of honest noise was measured"),
        (CACHED, ("--prover-dtype", CACHED), False, "no law of honest noise was measured"),
        ("bfloat16", ("--dtype", "float8"), False, "no law of honest noise was measured"),
        ("float32", ("--model", "reference:qwen3"), True, "wanted: a proof of reference:qwen3"),
    ],
)
def test_what_cannot_be_judged_begins_no_ledger(
    stated, flags, loads, words, refused, prove, small_checkpoint, tmp_path, monkeypatch
):
    prove()
    proof = tmp_path / "proof.jsonl"
    ledger = tmp_path / "ledger.sqlite3"
    text = proof.read_text()
    assert '"dtype":"float32"' in text
    proof.write_text(text.replace('"dtype":"float32"', f'"dtype":"{stated}"'))
    if not loads:
        monkeypatch.setattr("assay.models.load.digest_tensors", None)  # weights are read
    known = (
        "--block-hash",
        "b",
        "--public-key",
        "k",
        "--seq-len",
        16,
        "--nonces",
        "0:24",
        "--ledger",
        ledger,
    )
    assert words in refused(
        "poc", "verify", proof, "--model", small_checkpoint, "--device", "cpu", *known, *flags
    )
    assert not ledger.exists()


class OwnEngine(HFEngine):
    """An engine that calls itself by a name of its own."""

    @property
    def fingerprint(self):
        return replace(super().fingerprint, engine="own")


batches = []


@contextmanager
def start_own(launch, dtype, *, batch_size, seq_len, frame):
    """What a file of an engine of one's own has beside the engine."""
    batches.append(batch_size)
    model = load_model(launch.model, dtype=dtype, device="cpu").with_frame(frame)
    yield model, OwnEngine(model, batch_size=batch_size, seq_len=seq_len)


def test_an_engine_of_ones_own_is_a_file_and_a_line(
    told, assay, refused, command, small_checkpoint, tmp_path, monkeypatch
):
    own = ("--engine", "own")
    assert "wanted: 'hf' or 'vllm'" in refused(*command(*own))
    monkeypatch.setitem(ENGINES, "own", f"{__name__}:start_own")
    batches.clear()
    told(*command(*own))
    proof = tmp_path / "proof.jsonl"
    assert Proof.load(proof).header.fingerprint.engine == "own"
    model = ("--model", small_checkpoint)
    round = ("--block-hash", "b", "--public-key", "k", "--nonces", "0:24", "--seq-len", 16)
    preset = ("--preset", "poc-2.0")
    verdict = told("poc", "verify", proof, *model, *round, *preset, *own)
    assert verdict["verdict"] == "honest"
    few = ("--seq-len", 16, "--nonces", 8, "--batch-size", 8)
    found = assay("poc", "selftest", *model, "--preset", "artifact", *few, *own, "--json")
    assert json.loads(found.out)["comparisons"][-1]["setting"] == "batches of 2"
    assert batches == [8, 8, 8, 2], "by prover, judge and self-test"
    assert "`kernels` eager with --engine own" in refused(*command(*own, "--kernels", "eager"))
    monkeypatch.delitem(ENGINES, "own")
    assert "wanted: 'hf' or 'vllm'" in refused(*command(*own))


def test_an_engine_of_ones_own_refuses_receipts_by_its_name(monkeypatch):
    monkeypatch.setitem(ENGINES, "own", f"{__name__}:start_own")
    launch = Launch(model="small", engine="own", dtype="float32")
    with pytest.raises(UsageError, match="responses with --engine own"):
        open_prefill(launch, []).__enter__()
    monkeypatch.delitem(ENGINES, "own")
    with pytest.raises(ValueError, match="'hf' or 'vllm'"):
        launch.start()
