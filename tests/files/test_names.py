"""Two spellings of one name are one name wherever a name is taken, or the other one is refused."""

import json
import shutil
from pathlib import Path
from unicodedata import normalize

import pytest

from assay.errors import AssayError, UsageError
from assay.files.references import check_reference
from assay.models.resolve import resolve
from assay.poc import Round
from assay.poc.protocol.pins_file import NetworkPins
from assay.poc.responses.receipts import Adapter
from assay.poc.responses.requests import Request
from assay.poc.service import ServiceSettings
from assay.poc.validator.registry import Registry
from assay.poc.verdict import Account, Ledger
from assay.vhack.pairs.pairs import read_pairs, read_pool
from tests.poc.validator.conftest import nodes_text, pins_text
from tests.poc.verdict.ledgers import update

NAMES = ["modèle", "Ångström", "한국어", "İstanbul", "ṩ", "q̣̇-ẛ̣", "\u212b-\u2126"]
"""Names of which the composed and the taken apart spelling differ."""


def spellings(name: str) -> tuple[str, str]:
    composed = normalize("NFC", name)
    apart = normalize("NFD", name)
    assert composed != apart
    return composed, apart


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", ["public_key", "block_hash"])
def test_a_round_takes_one_spelling_of_a_name(name, field):
    composed, apart = spellings(name)
    names = {"public_key": "a", "block_hash": "b"}
    assert getattr(Round(**names | {field: composed}), field) == composed
    with pytest.raises(UsageError) as refused:
        Round(**names | {field: apart})
    assert refused.value.field == field
    assert "NFC" in refused.value.wanted


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_has_one_spelling(name):
    composed, apart = spellings(name)
    Request(request_id="r", prompt="p", adapter=composed)
    with pytest.raises(UsageError):
        Request(request_id="r", prompt="p", adapter=apart)
    with pytest.raises(UsageError):
        Adapter(apart, "0" * 64)


@pytest.mark.parametrize("name", NAMES)
def test_accounts_of_two_spellings_are_one(tmp_path, name):
    composed, apart = spellings(name)
    values = {"digest": "0" * 64, "preset": "poc-2.0"}
    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        for number, (key, build) in enumerate([(composed, apart), (apart, composed)]):
            account = Account(public_key=key, build=build, **values)
            ledger.append([update(number, account=account)])
        assert [(one.public_key, one.build) for one in ledger.accounts()] == [(composed, composed)]
        (standing,) = ledger.standings()
        assert standing.recorded == 16
        for key, build in ((composed, apart), (apart, composed)):
            account = Account(public_key=key, build=build, **values)
            assert ledger.standing(account) == standing
            assert [entry.seq for entry in ledger.entries(account)] == [1, 2]
        stranger = Account(public_key="nobody", build=composed, **values)
        assert (ledger.standing(stranger), [*ledger.entries(stranger)]) == (None, [])


@pytest.mark.parametrize("name", NAMES)
def test_pins_and_nodes_name_a_node_a_model_and_a_build_in_either_spelling(
    tmp_path, small_model, name
):
    composed, apart = spellings(name)
    (tmp_path / "pins.toml").write_text(pins_text(small_model, keys=[composed, apart]))
    with pytest.raises(AssayError):
        NetworkPins.load(tmp_path / "pins.toml")
    text = pins_text(small_model, keys=[composed])
    reference = json.dumps(str(small_model.reference))
    text = text.replace(f"reference = {reference}", f"reference = {json.dumps(apart)}")
    text = text.replace('name = "cpu"', f"name = {json.dumps(apart)}")
    (tmp_path / "pins.toml").write_text(text)
    network = NetworkPins.load(tmp_path / "pins.toml")
    assert network.model(composed) is network.model(apart) is network.models[0]
    nodes = nodes_text([apart]) + f"build = {json.dumps(composed)}\n"
    (tmp_path / "nodes.toml").write_text(nodes)
    registry = Registry.load(tmp_path / "pins.toml", tmp_path / "nodes.toml", ServiceSettings())
    assert list(registry.senders) == [composed]
    assert registry.senders[composed].build.name == composed
    with (tmp_path / "nodes.toml").open("a") as file:
        file.write(nodes_text([composed]))
    with pytest.raises(AssayError):  # the same key twice
        Registry.load(tmp_path / "pins.toml", tmp_path / "nodes.toml", ServiceSettings())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_a_model_is_found_under_either_spelling_and_has_one_name(
    tmp_path, small_model, name, on_disk
):
    folder = tmp_path / normalize(on_disk, name)
    folder.mkdir()
    shutil.copy(Path(small_model.reference) / "config.json", folder)
    shutil.copy(Path(small_model.reference) / "model.safetensors", folder)
    for spelling in spellings(name):
        check_reference(str(tmp_path / spelling))
        source = resolve(str(tmp_path / spelling))
        assert source.directory == folder
        assert source.reference == str(tmp_path / normalize("NFC", name))


def test_two_folders_that_look_alike_stay_two(tmp_path, small_model):
    for spelling in spellings("modèle"):
        (tmp_path / spelling).mkdir()
        shutil.copy(Path(small_model.reference) / "config.json", tmp_path / spelling)
        assert resolve(str(tmp_path / spelling)).directory == tmp_path / spelling


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_two_spellings_are_held_out_together(tmp_path, name):
    spelt = spellings(name)
    pairs = [
        {"prompt": "p", "clean": f"c{i}", "hack": f"h{i}", "group": group}
        for i, group in enumerate(spelt)
    ]
    (tmp_path / "pairs").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert {pair.group for pair in read_pairs(tmp_path / "pairs")} == {spelt[0]}
    pool = [{"prompt": "p", "completion": f"c{i}", "group": group} for i, group in enumerate(spelt)]
    (tmp_path / "pool").write_text("".join(json.dumps(sample) + "\n" for sample in pool))
    assert {sample.group for sample in read_pool(tmp_path / "pool")} == {spelt[0]}
