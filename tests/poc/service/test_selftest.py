"""The self-test of a server that runs: what it is asked, and what is said of its answers."""

import json

import pytest

from assay.cli import run
from assay.errors import ModelError
from assay.poc import Round
from assay.poc.selftest import run_remote_selftest
from assay.poc.service import ServiceSettings
from assay.poc.service.service_controller import Controller
from tests.poc.service.listening import listening

ROUND = Round(block_hash="b", public_key="k", preset="artifact", seq_len=4, model="fake")
KEY = "k" * 20


@pytest.fixture
def server(rig, tmp_path):
    settings = ServiceSettings(data_dir=tmp_path / "data", seq_len=4, api_keys=(KEY,))
    with listening(Controller(rig.deployment, settings)) as port:
        yield f"http://127.0.0.1:{port}/api/v1/pow"


def test_a_server_that_repeats_itself_has_the_same_bits(server, rig):
    result = run_remote_selftest(server, ROUND, key=KEY, batch_size=8, nonces=12)
    assert {row.outcome for row in result.comparisons} == {"same bits"}
    names = [row.setting for row in result.comparisons]
    assert names == ["again", "other neighbours", "alone in the batch", "batches of 2"]
    assert {(4, 8), (4, 2)} <= set(rig.shapes)


def test_a_server_whose_answers_depend_on_the_batch_is_found(server, rig, monkeypatch):
    deploy = rig.shapes.append

    def noting(shape):
        rig.scale = 1.0 if shape[1] == 8 else -1.0
        deploy(shape)

    monkeypatch.setattr(rig, "shapes", _Noting(noting))
    result = run_remote_selftest(server, ROUND, key=KEY, batch_size=8, nonces=12)
    rows = {row.setting: row for row in result.comparisons}
    assert rows["batches of 2"].changed == 12
    assert rows["again"].outcome == "same bits"
    assert result.exit_code == 2


class _Noting:
    """A list that calls a function for every entry."""

    def __init__(self, append):
        self.append = append


@pytest.mark.parametrize("wrong", [{"key": "x" * 20}, {"round": "other"}, {"path": "/nothing"}])
def test_a_server_that_refuses_is_an_error(wrong, server):
    url = server + wrong.get("path", "")
    round = (
        ROUND
        if "round" not in wrong
        else Round(block_hash="b", public_key="k", preset="artifact", seq_len=4, model="other")
    )
    with pytest.raises(ModelError):
        run_remote_selftest(url, round, key=wrong.get("key", KEY), batch_size=8, nonces=4)


def test_what_a_server_says_against_a_length_is_told(server):
    other = Round(block_hash="b", public_key="k", preset="artifact", seq_len=8, model="fake")
    with pytest.raises(ModelError) as error:
        run_remote_selftest(server, other, key=KEY, batch_size=8, nonces=4)
    assert '"wanted":"seq_len 4"' in error.value.seen
    assert "--seq-len" in error.value.do


def test_the_command_asks_a_server(server, tmp_path, capsys, monkeypatch):
    (tmp_path / "key").write_text(f"{KEY}\n")
    monkeypatch.setenv("ASSAY_API_KEY_FILE", str(tmp_path / "key"))
    words = ["poc", "selftest", "--model", "fake", "--preset", "artifact", "--url", server]
    words += ["--seq-len", "4", "--nonces", "8", "--batch-size", "8"]
    assert run([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "assay.poc.selftest/1"
    assert len(document["comparisons"]) == 4
    assert run([*words, "--engine", "hf"]) == 2
    assert "--engine" in capsys.readouterr().err
