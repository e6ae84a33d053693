"""Adapters in receipts: their lines, the digest, the computation, and what a replay says without
them.
"""

import copy
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from assay.errors import ModelError, ProofFormatError, ProofMismatch, UsageError
from assay.files.references import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from assay.models import Model
from assay.poc.responses import Receipt, ReceiptPins, Receipts, replay, respond
from assay.poc.responses.adapters import load_adapter
from assay.poc.responses.receipts import Adapter, digest_adapter, parse_receipt
from tests.lora import write_adapter
from tests.poc.responses.conftest import REQUESTS
from tests.wordings import refuses


@pytest.fixture(scope="module")
def directory(small_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), small_model)


@pytest.fixture(scope="module")
def served(small_model: Model, directory: Path) -> Receipts:
    """Two responses of the adapter, and two of the model."""
    adapter = load_adapter(directory)
    with adapter.on(small_model):
        made = respond(
            small_model, REQUESTS, block_hash="block_alpha", public_key="node_A", end_tokens=()
        )
    plain = respond(
        small_model, REQUESTS, block_hash="block_alpha", public_key="node_A", end_tokens=()
    )
    named = [replace(one, adapter=Adapter("tuned", adapter.digest)) for one in made.receipts[:2]]
    return Receipts.build(made.header, [*named, *plain.receipts[2:]], 1.0)


def line_of(receipt: Receipt) -> bytes:
    return f"{receipt.line()}\n".encode()


def test_a_receipt_names_its_adapter_and_one_without_is_the_same_line_as_before(served: Receipts):
    with_it = served.receipts[0]
    without = served.receipts[2]
    assert json.loads(with_it.line())["adapter"] == {
        "name": "tuned",
        "digest": with_it.adapter.digest,
    }
    assert "adapter" not in without.line()
    assert parse_receipt(line_of(with_it)).adapter == with_it.adapter
    for old, new in (
        ('"tuned"', '""'),
        ('{"name"', '{"path":"x","name"'),
        (with_it.adapter.digest, "0" * 63),
    ):
        with pytest.raises(ProofFormatError):
            parse_receipt(line_of(with_it).replace(old.encode(), new.encode()))
    with refuses(
        ProofFormatError, "a receipt names its adapter and one without is the same line as before"
    ):
        parse_receipt(line_of(without).replace(b'"sketches"', b'"adapter":null,"sketches"'))


def test_the_digest_is_that_of_both_files(directory: Path, tmp_path: Path):
    parts = [(directory / name).read_bytes() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    assert (
        digest_adapter(directory)
        == hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()
    )
    with refuses(ModelError, "the digest is that of both files"):
        digest_adapter(tmp_path)


def test_the_model_with_an_adapter_computes_what_peft_does_and_is_itself_again(
    small_model: Model, directory: Path
):
    from peft import PeftModel

    ids = torch.tensor([[5, 9, 12, 40, 7]])
    with torch.inference_mode():
        before = small_model.module(ids).logits
        with load_adapter(directory).on(small_model):
            ours = small_model.module(ids).logits
        after = small_model.module(ids).logits
        theirs = PeftModel.from_pretrained(copy.deepcopy(small_model.module), str(directory))(
            ids
        ).logits
    assert torch.equal(before, after)
    assert (ours - before).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_replay_with_the_adapter_finds_its_tokens_beside_those_of_the_model(
    served: Receipts, small_model: Model, directory: Path
):
    found = replay(served, small_model, adapter=load_adapter(directory))
    assert [one.receipt for one in found] == list(served.receipts)
    assert all(one.matches == len(one.receipt.output) for one in found)
    assert max(one.residuals.max() for one in found) < 1e-3


def test_an_adapter_that_is_not_named_shows(served: Receipts, small_model: Model):
    silent = [replace(one, adapter=None) for one in served.receipts]
    found = replay(Receipts.build(served.header, silent, 1.0), small_model)
    assert min(one.residuals.max() for one in found[:2]) > 0.01
    assert max(one.residuals.max() for one in found[2:]) < 1e-3


def test_without_the_adapter_or_with_another_the_replay_is_refused_by_name(
    served: Receipts, small_model: Model, tmp_path: Path
):
    with refuses(
        ProofMismatch, "without the adapter or with another the replay is refused by name"
    ) as raised:
        replay(served, small_model)
    assert "--lora" in raised.value.do
    other = load_adapter(write_adapter(tmp_path, small_model, rank=2))
    with refuses(
        ProofMismatch, "without the adapter or with another the replay is refused by name"
    ) as raised:
        replay(served, small_model, adapter=other)
    assert other.digest[:12] in raised.value.wanted


@pytest.mark.parametrize(("asked", "answered"), [("", "tuned"), ("tuned", ""), ("other", "tuned")])
def test_an_answer_of_another_adapter_than_was_asked_for_fails_by_name(
    served: Receipts, asked: str, answered: str
):
    receipt = served.receipts[0] if answered else replace(served.receipts[0], adapter=None)
    one = Receipts.build(served.header, [receipt], 1.0)
    with refuses(ProofMismatch, "an answer of another adapter than was asked for fails by name"):
        ReceiptPins(requests=[replace(REQUESTS[0], adapter=asked)]).check(one)
    ReceiptPins(requests=[replace(REQUESTS[0], adapter=answered)]).check(one)


def test_the_reference_loop_serves_the_model_itself(small_model: Model):
    with refuses(UsageError, "the reference loop serves the model itself"):
        respond(
            small_model, [replace(REQUESTS[0], adapter="tuned")], block_hash="B", public_key="K"
        )


def test_adapters_that_do_more_and_ranks_that_cannot_be_are_refused(
    small_model: Model, tmp_path: Path
):
    odd = {
        "use_dora": True,
        "bias": "all",
        "alpha_pattern": {"q_proj": 3},
        "layer_replication": [[0, 2]],
    }
    odd |= {
        "alora_invocation_tokens": [1],
        "lora_bias": True,
        "trainable_token_indices": [3],
        "of_tomorrow": 1,
    }
    odd |= {"init_lora_weights": "pissa_niter_16"}
    for more in ({name: value} for name, value in odd.items()):
        with pytest.raises(UsageError, match=next(iter(more))):
            load_adapter(write_adapter(tmp_path, small_model, **more))
    for rank in ({"r": 0}, {"r": -4, "use_rslora": True}, {"r": "four"}, {"lora_alpha": "nan"}):
        with refuses(ModelError, "adapters that do more and ranks that cannot be are refused"):
            load_adapter(write_adapter(tmp_path, small_model, **rank))


def test_an_adapter_as_peft_writes_it_today_is_read(small_model: Model, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="gaussian"
    )
    get_peft_model(copy.deepcopy(small_model.module), settings).save_pretrained(tmp_path)
    assert len(load_adapter(tmp_path).products) == small_model.num_layers


def test_factors_that_are_no_matrices_are_refused_by_name(directory: Path, tmp_path: Path):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    name = min(tensors)
    save_file(tensors | {name: tensors[name][0].clone()}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(UsageError, match=name):
        load_adapter(tmp_path)


def test_an_adapter_that_finds_no_room_leaves_the_model_as_it_was(
    small_model: Model, directory: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[object] = []

    def adds(*factors: object) -> object:
        if made:
            raise MemoryError
        made.append(factors)
        return lambda *_: None

    def hooks() -> list[int]:
        return [len(module._forward_hooks) for module in small_model.module.modules()]

    before = (
        hooks()
    )  # transformers keeps some of its own on a model that has shown its hidden states
    monkeypatch.setattr("assay.poc.responses.adapters.addition_hook", adds)
    with pytest.raises(MemoryError), load_adapter(directory).on(small_model):
        pass
    assert made
    assert hooks() == before


def test_an_adapter_of_another_model_is_refused_by_its_layer(small_model: Model, directory: Path):
    adapter = load_adapter(directory)
    name, (a, b) = next(iter(adapter.products.items()))
    for odd in (
        {name: (a[:, :-1], b)},
        {"model.layers.99.self_attn.q_proj": (a, b)},
        {"lm_head.x": (a, b)},
    ):
        with (
            pytest.raises(ModelError, match=next(iter(odd))),
            replace(adapter, products=odd).on(small_model),
        ):
            pass


def test_the_scale_of_a_rank_stabilised_adapter_is_over_its_root(
    small_model: Model, tmp_path: Path
):
    assert load_adapter(write_adapter(tmp_path / "a", small_model)).scale == 2.0
    assert np.isclose(
        load_adapter(write_adapter(tmp_path / "b", small_model, use_rslora=True)).scale, 4.0
    )
