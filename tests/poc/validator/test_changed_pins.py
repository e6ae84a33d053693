"""Messages that wait while the pins change: no node is judged by what was agreed on later."""

import re
from threading import Event
from unittest.mock import Mock

import pytest

from assay.poc.validator import recomputer, validator_controller
from assay.poc.validator.claims import Claim
from assay.poc.validator.laws import Noises
from assay.poc.validator.recomputer import Budget
from assay.poc.verdict.ledger import Ledger
from tests.poc.validator.conftest import BLOCKS, body_of, nodes_text, pins_text, proof_of
from tests.usual import usual
from tests.waiting import until


@pytest.fixture
def waiting(stopped, small_model):
    """A validator with honest callbacks of two blocks, whose worker a test runs by hand."""
    for block, height in BLOCKS.items():
        stopped.announce(block, height)
        about = {"block": block, "block_height": height}
        stopped.send(body_of(proof_of(small_model, "node_A", range(150), **about)))
    return stopped


def read_again(running, how: str) -> None:
    """Have a validator read its changed pins, in a new process if it is stopped."""
    if how == "while it runs":
        running.controller.tend()
    else:
        running.restart()
        until(lambda: running.controller.deployment)


def recorded(running) -> int:
    """Run the worker until nothing is left to draw; return the nonces of node_A in the ledger."""
    while running.controller.inbox.waiting():
        assert running.controller.worker.step(running.controller.loaded.result()) == 0.0
    return running.node("node_A")["recorded"]


@pytest.mark.parametrize(
    "how", usual(["while it runs", "while it is stopped"], "while it is stopped")
)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seq_len = 8", "seq_len = 12"),
        ("strength = 32", "strength = 256"),
        ('preset = "poc-2.0"', 'preset = "permutation"'),
        ('preset = "poc-2.0"', 'preset = "layer-signs"'),
        ('attention = "*"', 'attention = "sdpa"'),
    ],
)
def test_an_honest_callback_is_not_judged_under_pins_of_another_computation(
    waiting, small_model, tmp_path, monkeypatch, old, new, how
):
    """It states neither its length, seeds, preset nor build: it was fraud of an honest node.

    Each of the three messages is dropped as a whole, and spends none of the nonces of an hour.
    """
    spent = []
    monkeypatch.setattr(Budget, "spend", lambda self, nonces: spent.append(nonces))
    changed = pins_text(small_model).replace(old, new)
    assert changed != pins_text(small_model)
    (tmp_path / "pins.toml").write_text(changed)
    read_again(waiting, how)
    assert recorded(waiting) == 0
    assert waiting.verdict("node_A") == "undecided"
    assert sum(spent) == 0 < max(spent)
    metrics = waiting.client.get("/metrics").text
    assert float(re.search(r"assay_validator_dropped_draws_total (\d\S*)", metrics)[1]) == 3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("fewest_nonces = 8", "fewest_nonces = 9"),
        pytest.param("node_count = 3", "node_count = 6", marks=pytest.mark.slow),
        pytest.param("r_target = 1.416", "r_target = 1.3", marks=pytest.mark.slow),
        ("seq_len = 8", 'seq_len = 8\nblock_hash = "block_beta"\nblock_height = 8'),
    ],
)
def test_a_change_of_the_pins_that_changes_no_value_drops_nothing(
    waiting, small_model, tmp_path, old, new
):
    """Proofs of the block before were dropped, and with them what a node had lied in them."""
    proof_of(small_model, "node_B", range(40)).save(tmp_path / "proof.jsonl")
    waiting.send((tmp_path / "proof.jsonl").read_text(), key="node_B", path="proofs")
    changed = pins_text(small_model, keys=("node_A", "node_B", "node_C", "node_D"))
    assert old in changed
    (tmp_path / "pins.toml").write_text(changed.replace(old, new))
    before = waiting.controller.registry
    waiting.controller.tend()
    assert waiting.controller.registry is not before
    claimed = waiting.node("node_A")["claimed"]
    assert recorded(waiting) == claimed > 150
    assert waiting.node("node_B")["recorded"] == 40
    assert waiting.verdict("node_A") == waiting.verdict("node_B") == "honest"


def test_pins_that_are_read_during_a_pass_bring_no_law_of_theirs_into_it(
    waiting, small_model, tmp_path, monkeypatch
):
    """Distances that the old pins allowed were judged by the law of the vectors of the new ones."""
    changed = pins_text(small_model, preset="artifact")
    decode = Claim.decode

    def change_pins_after(*arguments):
        claim = decode(*arguments)
        (tmp_path / "pins.toml").write_text(changed)
        waiting.controller.tend()
        return claim

    monkeypatch.setattr(Claim, "decode", change_pins_after)
    updates = []
    append = Ledger.append
    monkeypatch.setattr(
        Ledger, "append", lambda self, new: append(self, updates.extend(new) or new)
    )
    before = waiting.controller.registry
    waiting.controller.worker.step(waiting.controller.loaded.result())
    assert waiting.controller.registry is not before
    assert {update.account.preset for update in updates} == {"poc-2.0"}
    assert {update.noise.as_dict()["kind"] for update in updates} == {"scale"}  # of distances


def test_pins_that_are_read_while_the_model_begins_have_their_own_laws(
    validating, small_model, tmp_path, monkeypatch
):
    """The laws were those of the pins of the start, and messages were held against these."""
    begun = Event()
    changed = Event()

    def find_slowly(*arguments):
        begun.set()
        changed.wait(0.5)
        return Noises(*arguments)

    monkeypatch.setattr(validator_controller, "Noises", find_slowly)
    with validating() as running:
        assert begun.wait(20)
        (tmp_path / "pins.toml").write_text(pins_text(small_model, preset="permutation"))
        running.controller.tend()
        changed.set()
        until(lambda: running.controller.deployment)
        running.announce("block_beta", 8)
        about = {"block": "block_beta", "block_height": 8, "preset": "permutation"}
        running.send(body_of(proof_of(small_model, "node_A", **about)))
        until(lambda: running.node("node_A")["recorded"])


def test_what_is_dropped_gives_its_nonces_back_once(stopped, small_model, tmp_path, monkeypatch):
    """It gave them back with every pass that failed: an hour had more than its nonces."""
    stopped.send(body_of(proof_of(small_model, "node_B", range(60))))
    stopped.controller.inbox.plan(["node_A", "node_B"], 32)
    others = ("node_D", "node_B", "node_C")
    (tmp_path / "pins.toml").write_text(pins_text(small_model, keys=others))
    (tmp_path / "nodes.toml").write_text(nodes_text(others))
    stopped.controller.tend()
    spent = []
    monkeypatch.setattr(Budget, "spend", lambda self, nonces: spent.append(nonces))
    worker = stopped.controller.worker
    deployment = stopped.controller.loaded.result()
    with monkeypatch.context() as patched:
        patched.setattr(recomputer, "recompute", Mock(side_effect=RuntimeError))
        for _ in range(3):
            with pytest.raises(RuntimeError):
                worker.step(deployment)
    assert worker.step(deployment) == 0.0
    assert sum(spent) == -16
    assert stopped.node("node_B")["recorded"] == 16


@pytest.mark.parametrize(
    "change",
    [
        ("seq_len = 8", "seq_len = 1000000"),
        ("[[models.builds]]", 'weights = "random-all"\n[[models.builds]]'),
        (
            "[[models.builds]]",
            f'frame = {{file = "frame.safetensors", sha256 = "{"0" * 64}"}}\n[[models.builds]]',
        ),
    ],
)
def test_pins_that_the_loaded_model_does_not_fit_are_not_taken(
    waiting, small_model, tmp_path, change
):
    """It had the frame, weights and positions of the start, and convicted who had the new ones."""
    changed = pins_text(small_model).replace(*change)
    assert changed != pins_text(small_model)
    (tmp_path / "pins.toml").write_text(changed)
    before = waiting.controller.registry
    waiting.controller.tend()
    assert waiting.controller.registry is before
    assert recorded(waiting) > 0
    assert waiting.verdict("node_A") == "honest"


@pytest.mark.parametrize("how", ["while it runs", "while it is stopped"])
def test_a_callback_that_is_late_is_not_judged_under_pins_that_came_after_its_block(
    stopped, small_model, tmp_path, how
):
    """An honest node that answered after the change was fraud. It is refused, and the next block
    counts.
    """
    (block, height), (fresh, fresh_height) = BLOCKS.items()
    stopped.announce(block, height)
    late = body_of(proof_of(small_model, "node_A", range(150), block=block, block_height=height))
    longer = pins_text(small_model).replace("seq_len = 8", "seq_len = 12")
    (tmp_path / "pins.toml").write_text(longer)
    read_again(stopped, how)
    refusal = stopped.send(late, status=422)
    assert "announced under the pins of now" in refusal["wanted"]
    assert recorded(stopped) == 0
    stopped.announce(fresh, fresh_height)
    about = {"block": fresh, "block_height": fresh_height, "seq_len": 12}
    stopped.send(body_of(proof_of(small_model, "node_A", range(150), **about)))
    assert recorded(stopped) > 0
    assert stopped.verdict("node_A") == "honest"


def test_blocks_of_an_older_inbox_stay_open(stopped, small_model):
    stopped.send(body_of(proof_of(small_model, "node_A", range(150))))
    with stopped.controller.inbox.database.write() as connection:
        connection.exec_driver_sql("UPDATE blocks SET computed = NULL")
    stopped.restart()
    until(lambda: stopped.controller.deployment)
    stopped.send(body_of(proof_of(small_model, "node_B", range(150))))
    assert recorded(stopped) > 0 < stopped.node("node_B")["recorded"]
