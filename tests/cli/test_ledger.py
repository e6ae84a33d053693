"""``assay poc ledger`` and ``verify --ledger``: the life of a node on the command line, and its
exit codes.
"""

import io
import json
import sqlite3
import sys

import pytest

from assay.cli import run
from assay.poc import Proof, Round, cheats, prove
from assay.poc.verdict import Ledger
from tests.poc.verdict.ledgers import filled, update

PINS = ("--block-hash", "b", "--public-key", "k", "--seq-len", 16, "--nonces", "0:48")


@pytest.fixture
def ledger(tmp_path):
    return filled(tmp_path / "ledger.sqlite3")


def test_show(assay, told, refused, ledger):
    shown = assay("poc", "ledger", "show", ledger)
    assert shown.code == 0, shown.err
    assert all(words in shown.out for words in ("node_2", "fraud", "9 entries, head "))
    assert "such as node_0, node_1, node_2\n" in refused(
        "poc", "ledger", "show", ledger, "--public-key", "nobody"
    )
    found = told("poc", "ledger", "show", ledger)
    assert (found["schema"], found["count"]) == ("assay.poc.ledger/1", 9)
    assert [one["public_key"] for one in found["accounts"]] == ["node_0", "node_1", "node_2"]
    assert (found["accounts"][2]["verdict"], found["accounts"][2]["audits"]) == ("fraud", 3)
    (account,) = told("poc", "ledger", "show", ledger, "--public-key", "node_1", "--limit", 2)[
        "accounts"
    ]
    assert [entry["seq"] for entry in account["entries"]] == [5, 8]
    assert len(account["entries"][0]["residuals"]) == 8
    text = assay("poc", "ledger", "show", ledger, "--public-key", "node_1").out
    assert "audits of build H100, preset artifact" in text


def test_what_a_strange_ledger_says_is_one_line_without_control_characters(assay, tmp_path):
    path = tmp_path / "ledger.sqlite3"
    with Ledger(path) as ledger:
        ledger.append([update(1, key="node_A\nnode_B honest")])
    hostile = "\x1b]0;title\x07\n9 entries"
    with sqlite3.connect(path) as database:
        for trigger in ("updates_never_update", "ledger_counts_up"):
            database.execute(f"DROP TRIGGER {trigger}")
        for table in ("updates", "ledger"):
            database.execute(f"UPDATE {table} SET hash = ?", [hostile])
    database.close()
    shown = assay("poc", "ledger", "show", path)
    assert shown.code == 0, shown.err
    assert not set("\x1b\x07") & set(shown.out)
    assert len(shown.out.splitlines()) == 3


@pytest.mark.parametrize("key", ["caf\u00e9", "cafe\u0301"])
def test_show_finds_a_key_in_either_spelling(told, tmp_path, key):
    path = tmp_path / "ledger.sqlite3"
    with Ledger(path) as ledger:
        ledger.append([update(1, key="cafe\u0301")])
    (account,) = told("poc", "ledger", "show", path, "--public-key", key)["accounts"]
    assert (account["public_key"], len(account["entries"])) == ("caf\u00e9", 1)


def test_audit_says_which_entry_was_changed(assay, told, refused, ledger, tmp_path):
    clean = assay("poc", "ledger", "audit", ledger)
    assert clean.code == 0, clean.err
    assert "clean" in clean.out
    head = told("poc", "ledger", "audit", ledger)["head"]
    assert assay("poc", "ledger", "audit", ledger, "--head", head).code == 0
    assert assay("poc", "ledger", "audit", ledger, "--head", "0" * 64).code == 1
    refused("poc", "ledger", "audit", ledger, "--head", "latest")
    with sqlite3.connect(ledger) as database:
        database.execute("DROP TRIGGER updates_never_update")
        database.execute(
            'UPDATE updates SET entry = replace(entry, \'"fault":null\', \'"fault":""\') WHERE '
            "seq = 5"
        )
    database.close()
    found = assay("poc", "ledger", "audit", ledger)
    assert found.code == 1
    assert "entry 5: its text does not have its hash" in found.out
    faults = json.loads(assay("poc", "ledger", "audit", ledger, "--json").out)
    assert (faults["clean"], faults["faults"][0]["entry"]) == (False, 5)
    for wrong in (tmp_path / "none.sqlite3", tmp_path):
        refused("poc", "ledger", "audit", wrong)


def test_export_is_audited_elsewhere(assay, told, refused, ledger, tmp_path):
    out = tmp_path / "ledger.jsonl"
    assert told("poc", "ledger", "export", ledger, "-o", out)["entries"] == 9
    refused("poc", "ledger", "export", ledger, "-o", out)
    assert assay("poc", "ledger", "export", ledger, "-o", out, "--overwrite").code == 0
    assert assay("poc", "ledger", "audit", out).code == 0


def test_names_of_others_do_not_write_to_the_terminal(assay, tmp_path):
    with Ledger(tmp_path / "l.sqlite3") as opened:
        opened.append([update(0, key="\x1b[2Jkey", block_hash="\x1b]0;title\x07")])
    for arguments in ((), ("--public-key", "\x1b[2Jkey")):
        shown = assay("poc", "ledger", "show", tmp_path / "l.sqlite3", *arguments)
        assert shown.code == 0
        assert "\x1b" not in shown.out
        assert "\x07" not in shown.out


@pytest.fixture(scope="module")
def proofs(small_model, tmp_path_factory):
    """An honest proof, and one that is invented."""
    round = Round(block_hash="b", public_key="k", seq_len=16, model="small")
    folder = tmp_path_factory.mktemp("proofs")
    made = prove(small_model, round, range(48), batch_size=8)
    made.save(folder / "honest.jsonl")
    cheats.invented(Proof.load(folder / "honest.jsonl")).save(folder / "invented.jsonl")
    return {name: folder / f"{name}.jsonl" for name in ("honest", "invented")}


def test_verify_adds_to_the_life_and_follows_it(assay, told, proofs, small_checkpoint, tmp_path):
    path = tmp_path / "life.sqlite3"
    flags = ("--model", small_checkpoint, "--device", "cpu", *PINS, "--ledger", path)
    life = told("poc", "verify", proofs["honest"], *flags)["life"]
    assert (life["verdict"], life["audits"], life["n"]) == ("honest", 1, 48)
    again = assay("poc", "verify", proofs["honest"], *flags)
    assert again.code == 0
    assert "honest, after 2 audit(s) with 48 nonces that count" in again.out
    assert "life" not in told("poc", "verify", proofs["honest"], *flags[:-2])
    assert assay("poc", "ledger", "audit", path).code == 0


def test_a_proof_that_is_invented_is_not_washed_by_a_good_one(
    assay, proofs, small_checkpoint, tmp_path
):
    """Nor is it a conviction: all of it is of one block."""
    path = tmp_path / "life.sqlite3"
    flags = ("--model", small_checkpoint, "--device", "cpu", *PINS, "--ledger", path)
    first = assay("poc", "verify", proofs["invented"], *flags)
    assert (first.code, f"new ledger {path}\n" in first.err) == (2, True)
    after = assay("poc", "verify", proofs["honest"], *flags)
    assert (after.code, "new ledger" in after.err) == (2, False)
    assert "undecided, after 2 audit(s) with 48 nonces that count" in after.out


def test_a_life_of_fraud_is_code_1(assay, small_model, small_checkpoint, tmp_path):
    path = tmp_path / "life.sqlite3"
    codes = []
    for block in ("b", "c"):
        made = prove(
            small_model,
            Round(block_hash=block, public_key="k", seq_len=16),
            range(80),
            batch_size=8,
        )
        made.save(tmp_path / f"honest {block}.jsonl")
        cheats.invented(Proof.load(tmp_path / f"honest {block}.jsonl")).save(
            tmp_path / f"{block}.jsonl"
        )
        pins = (
            "--block-hash",
            block,
            "--public-key",
            "k",
            "--seq-len",
            16,
            "--nonces",
            "0:80",
            "--sample",
            80,
        )
        flags = ("--model", small_checkpoint, "--device", "cpu", *pins, "--ledger", path)
        codes.append(assay("poc", "verify", tmp_path / f"{block}.jsonl", *flags).code)
    assert codes == [2, 1]


def test_what_cannot_be_recorded_is_refused_before_the_model_is_loaded(refused, proofs, tmp_path):
    known = (
        "poc",
        "verify",
        proofs["honest"],
        "--model",
        "no/model",
        "--block-hash",
        "b",
        "--public-key",
        "k",
    )
    said = refused(*known, "--ledger", tmp_path / "l.sqlite3")
    assert "--ledger with seq_len taken on the prover's word" in said
    assert "pass --seq-len" in said
    assert not (tmp_path / "l.sqlite3").exists()
    known += ("--seq-len", 16, "--ledger")
    Ledger(tmp_path / "strict.sqlite3", alpha=1e-6).close()
    assert "pass `alpha` 1e-06" in refused(*known, tmp_path / "strict.sqlite3")
    (tmp_path / "notes.txt").write_text("no ledger")
    refused(*known, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "no ledger"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_another_encoding_is_no_traceback(tmp_path, monkeypatch, encoding):
    with Ledger(tmp_path / "l.sqlite3") as ledger:
        ledger.append([update(0, key="Ключ")])
    taken = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(taken, encoding=encoding))
    assert run(["poc", "ledger", "show", str(tmp_path / "l.sqlite3")]) == 0
    sys.stdout.flush()
    assert rb"\u041a\u043b\u044e\u0447" in taken.getvalue()
