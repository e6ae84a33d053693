"""A pass that dies between its steps: nothing is lost, and nothing counts twice."""

import re
import shutil
import sqlite3
import time
from contextlib import closing

import pytest

from assay.errors import BadWeights, StorageError, UsageError
from assay.poc.service import ServiceSettings
from assay.poc.validator import ValidatorSettings
from assay.poc.validator.inbox import Inbox
from assay.poc.validator.recomputer import recompute
from assay.poc.validator.registry import Registry
from assay.poc.validator.validator_controller import ValidatorController
from assay.poc.verdict import Ledger
from tests.poc.validator.conftest import KEYS, Running, body_of, nodes_text, pins_text, proof_of
from tests.waiting import until
from tests.wordings import refuses


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def _steps(running: Running) -> None:
    """Run the worker until nothing is left to draw."""
    controller = running.controller
    for _ in range(100):
        controller.worker.step(controller.loaded.result())
    assert not controller.inbox.unfinished(10)


def _counted(running: Running) -> list[int]:
    """All nonces that count in the ledger."""
    ledger = running.controller.ledger
    found = []
    for account in ledger.accounts():
        for entry in ledger.entries(account):
            reasons = dict(entry.excluded)
            found += [nonce for place, nonce in enumerate(entry.nonces) if place not in reasons]
    return sorted(found)


@pytest.mark.parametrize(
    "where", ["plan", "recompute", "append before", "append after", "finish before", "finish after"]
)
def test_a_kill_at_any_step_loses_nothing_and_counts_nothing_twice(
    stopped, small_model, monkeypatch, where
):
    kind, name = {
        "plan": (Inbox, "plan"),
        "recompute": (None, "recompute"),
        "append": (Ledger, "append"),
        "finish": (Inbox, "finish"),
    }[where.partition(" ")[0]]
    real = recompute if kind is None else getattr(kind, name)
    armed = [True]

    def dies(*arguments, **named):
        if armed[0] and not where.endswith("after"):
            raise Killed
        result = real(*arguments, **named)
        if armed[0] and not where.endswith("before"):
            raise Killed
        return result

    if kind is None:
        monkeypatch.setattr("assay.poc.validator.recomputer.recompute", dies)
    else:
        monkeypatch.setattr(kind, name, dies)
    with pytest.raises(Killed):
        stopped.controller.worker.step(stopped.controller.loaded.result())
    armed[0] = False
    stopped.restart()
    until(lambda: stopped.controller.deployment)
    _steps(stopped)
    body = body_of(proof_of(small_model, "node_A", range(60)))
    assert _counted(stopped) == body["nonces"]
    (standing,) = stopped.controller.ledger.standings()
    assert standing.evidence.n == len(body["nonces"])
    (change,) = [row for row in stopped.get("/verdicts")["verdicts"] if row["verdict"] == "honest"][
        :1
    ]
    assert change["public_key"] == "node_A"


def test_a_message_that_the_pins_no_longer_allow_is_dropped_and_not_drawn_for_ever(
    stopped, small_model, tmp_path
):

    (tmp_path / "pins.toml").write_text(
        pins_text(small_model, keys=KEYS[1:]).replace("node_id = 0", "node_id = 2", 1)
    )
    (tmp_path / "nodes.toml").write_text(nodes_text(KEYS[1:]))
    stopped.controller.tend()
    assert stopped.controller.registry.senders.get("node_A") is None
    stopped.controller.inbox.plan(["node_A"], 100)
    _steps(stopped)
    assert _counted(stopped) == []
    assert "assay_validator_dropped_draws_total 1.0" in stopped.client.get("/metrics").text


def test_a_draw_that_the_model_cannot_compute_stops_no_other_node(
    stopped, small_model, monkeypatch
):
    body = body_of(proof_of(small_model, "node_B", range(60)))
    stopped.send(body, id="m2")

    def overflow(deployment, batch_size, inputs, *received):
        if any(round.public_key == "node_A" for round, _ in inputs):
            raise BadWeights("a value that is NaN", wanted="finite ones", do="take another format")
        return recompute(deployment, batch_size, inputs, *received)

    monkeypatch.setattr("assay.poc.validator.recomputer.recompute", overflow)
    worker = stopped.controller.worker
    for _ in range(100):
        try:
            worker.step(stopped.controller.loaded.result())
        except BadWeights as error:  # nothing else is there to draw beside it
            worker.error = error.seen
    assert _counted(stopped) == body["nonces"]
    dropped = re.search(
        r"assay_validator_dropped_draws_total (\d+)", stopped.client.get("/metrics").text
    )
    assert int(dropped[1]) > 0


@pytest.mark.parametrize("column", ["claim", "pins"])
def test_a_message_of_which_an_older_version_did_not_keep_what_it_was_held_against_is_dropped(
    stopped, column
):
    with stopped.controller.inbox.database.write() as connection:
        connection.exec_driver_sql(f"UPDATE inbox SET {column} = NULL")
    _steps(stopped)
    assert _counted(stopped) == []


def test_standings_can_be_read_while_others_take_their_place(stopped, small_model):
    """Requests read them in other threads: a dictionary that grows meanwhile was an error for who
    asked.
    """
    _steps(stopped)
    worker = stopped.controller.worker
    reading = iter(worker.standings.values())
    stopped.send(body_of(proof_of(small_model, "node_B", range(60))), id="m2")
    _steps(stopped)
    assert [standing.account.public_key for standing in reading] == ["node_A"]
    assert list(worker.standings) == ["node_A", "node_B"]


@pytest.mark.parametrize(
    ("step", "real"),
    [
        ("assay.poc.validator.recomputer.recompute", recompute),
        ("assay.poc.verdict.Ledger.append", Ledger.append),
    ],
)
def test_evidence_on_an_old_build_does_not_stand_for_the_present_one(
    stopped, tmp_path, monkeypatch, step, real
):
    """Pins that change while a pass runs: what it finds is of the build that its claims were read
    under.
    """
    controller = stopped.controller
    pins = tmp_path / "pins.toml"

    def change_pins(*arguments):
        pins.write_text(pins.read_text().replace('name = "cpu"', 'name = "new"'))
        settings = controller.settings
        # `tend` would wait for the ledger here, and then choose the standings once more.
        controller.registry = Registry.load(settings.pins, settings.nodes, controller.server)
        return real(*arguments)

    monkeypatch.setattr(step, change_pins)
    controller.worker.step(controller.loaded.result())
    assert [account.build for account in controller.ledger.accounts()] == ["cpu"]
    assert controller.worker.standings == {}


def test_a_change_of_pins_reads_no_ledger(stopped, tmp_path, monkeypatch):
    """Reading the evidence of ten thousand nodes again held evidence up for seconds."""
    _steps(stopped)
    controller, pins, before = (
        stopped.controller,
        tmp_path / "pins.toml",
        stopped.controller.worker.standings,
    )
    monkeypatch.setattr(controller.ledger, "standings", lambda: pytest.fail("the ledger was read"))
    text = pins.read_text()
    for build, wanted in (("new", {}), ("cpu", before)):
        pins.write_text(text.replace('name = "cpu"', f'name = "{build}"'))
        controller.tend()
        assert controller.worker.standings == wanted
    assert list(before) == ["node_A"]


def test_a_changed_file_of_nodes_without_secrets_is_refused_where_others_reach_the_port(
    stopped, tmp_path
):
    """Whoever reaches it could sign for such a node, and have it convicted."""
    nodes = tmp_path / "nodes.toml"
    signed = nodes.read_text()
    unsigned = signed + '[[nodes]]\npublic_key = "node_D"\n'
    stopped.signed = True
    stopped.restart()
    controller = stopped.controller
    before = controller.registry
    for text in (unsigned, "".join(f'[[nodes]]\npublic_key = "{key}"\n' for key in KEYS)):
        nodes.write_text(text)
        controller.tend()
        assert controller.registry is before  # and a message of node_A still needs its secret
        stopped.send(
            body_of(proof_of(stopped.model, "node_A", range(60, 70))),
            key="node_B",
            id="m7",
            status=401,
        )
    nodes.write_text(signed)
    stopped.signed = False  # on this machine alone it is taken
    stopped.restart()
    assert "node_D" not in stopped.controller.registry.senders
    nodes.write_text(unsigned)
    stopped.controller.tend()
    assert not stopped.controller.registry.senders["node_D"].signatures


def test_a_start_without_secrets_is_refused_where_others_reach_the_port(small_model, tmp_path):
    (tmp_path / "pins.toml").write_text(pins_text(small_model))
    settings = ValidatorSettings(pins=tmp_path / "pins.toml")
    server = ServiceSettings(data_dir=tmp_path / "data")
    with refuses(UsageError, "a start without secrets is refused where others reach the port"):
        ValidatorController(lambda: pytest.fail("loaded"), settings, server, signed=True)
    assert not (tmp_path / "data").exists()


def test_old_messages_are_pruned_and_those_being_drawn_stay(stopped, small_model):
    inbox = stopped.controller.inbox
    assert inbox.prune(keep=3600) == 0
    inbox.plan(["node_A"], 100)
    assert inbox.prune(keep=-1) == 0
    _steps(stopped)
    assert inbox.prune(keep=-1) == 1
    assert stopped.node("node_A")["messages"] == 1


def test_a_clock_that_is_suddenly_far_ahead_deletes_no_message(stopped, monkeypatch):
    """What was acknowledged and not drawn yet would be lost without a trace."""
    now = time.time()
    monkeypatch.setattr("assay.poc.validator.inbox.time.time", lambda: now + 10 * 86_400)
    assert stopped.controller.inbox.prune(keep=3600) == 0
    assert stopped.controller.inbox.prune(keep=-3600) == 1


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["emptied", "older", "another"])
def test_a_ledger_that_has_lost_something_stops_the_start(validating, small_model, tmp_path, lost):
    """The inbox calls its nonces drawn, so nothing that is missing would ever be found again."""
    ledger = tmp_path / "data" / "ledger.sqlite3"
    older = tmp_path / "older"
    with validating() as running:
        for key in ("node_A", "node_B"):
            running.send(body_of(proof_of(small_model, key)))
            until(lambda key=key: running.node(key)["checked"] >= 20)
            running.close()
            if not older.exists():
                shutil.copy(ledger, older)
            running.start()  # with the whole ledger
        running.close()
        if lost == "older":
            shutil.copy(older, ledger)
        else:
            ledger.unlink()
            ledger.touch()
        if lost == "another":
            Ledger(ledger).close()
        whole = ledger.read_bytes()
        with refuses(StorageError, "a ledger that has lost something stops the start"):
            running.start()
        assert lost == "emptied" or ledger.read_bytes() == whole
        with (
            closing(sqlite3.connect(tmp_path / "data" / "validator.sqlite3")) as database,
            database,
        ):
            database.execute("DELETE FROM ledger_heads")  # as a file of an older version has none
        running.start()
