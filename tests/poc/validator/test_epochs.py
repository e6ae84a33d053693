"""Secrets: committed to before they are used, hidden while they are, and enough to draw every
sample again.
"""

import hashlib
import json
import re
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats as distributions

from assay.poc.validator.epochs import Epoch, commitment, draw, message_seed
from assay.poc.validator.inbox import NAME, Inbox, Message
from tests.poc.service.conftest import execute
from tests.poc.validator.conftest import body_of, proof_of
from tests.waiting import until


@pytest.fixture
def opened(tmp_path):
    """Open the inbox of a directory; what was opened is closed."""
    with ExitStack() as made:
        yield lambda **how: made.enter_context(
            closing(Inbox(tmp_path, epoch_seconds=3600.0, sample=8, **how))
        )


@pytest.fixture
def inbox(opened):
    return opened()


def _end_epoch(inbox: Inbox) -> None:
    inbox.epoch_seconds = 0.0
    inbox.roll()
    inbox.epoch_seconds = 3600.0


def _message(id: str, key: str = "node_A", nonces: int = 40, body: bytes = b"") -> Message:
    return Message(key, id, "generated", nonces, body or json.dumps({"id": id}).encode())


def test_a_commitment_is_public_one_epoch_before_its_secret_draws(inbox):
    following, current = inbox.epochs(10)
    assert (current["epoch"], following["epoch"], following["begins"]) == (1, 2, None)
    assert current["secret"] is following["secret"] is None
    _end_epoch(inbox)
    newest, now, ended = inbox.epochs(10)
    assert now["commitment"] == following["commitment"]
    assert ended["commitment"] == current["commitment"]
    assert (now["secret"], newest["secret"], now["ends"]) == (None, None, None)
    assert commitment(bytes.fromhex(ended["secret"]), 1) == ended["commitment"]


def test_a_secret_that_is_public_draws_from_nothing_any_more(inbox):
    inbox.add([_message("early")])
    _end_epoch(inbox)
    secret = bytes.fromhex(inbox.epochs(10)[2]["secret"])
    inbox.add([_message("late")])
    early, late = inbox.plan(["node_A", "node_A"], 100)
    assert {early.id, late.id} == {"early", "late"}
    for found in (early, late):
        seed = message_seed(secret, "node_A", found.id, found.digest)
        assert (seed == found.seed) == (found.id == "early")


def test_secrets_survive_a_restart(tmp_path, inbox, opened):
    before = inbox.epochs(10)
    inbox.close()
    assert opened().epochs(10) == before
    assert execute(tmp_path / NAME, "SELECT count(*) FROM epochs") == [(2,)]


def test_a_commitment_was_served_for_a_whole_epoch_before_its_secret_draws(
    inbox, opened, monkeypatch
):
    """A clock that is set does not end an epoch, and neither does a time in which no client read
    it.
    """
    clock = [time.monotonic()]
    far = time.time() + 10 * 86_400
    monkeypatch.setattr("assay.poc.validator.inbox.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("assay.poc.validator.inbox.time.time", lambda: far)
    clock[0] += 3000
    inbox.roll()
    assert inbox.epochs(10)[-1]["ends"] is None
    inbox.close()
    clock[0] += 10**6
    again = opened()
    for seconds, ended in ((500, False), (101, True)):
        clock[0] += seconds
        again.roll()
        assert (again.epochs(10)[-1]["ends"] is not None) is ended


def test_a_disk_that_is_full_at_the_end_of_an_epoch_delays_only_that_end(inbox, monkeypatch):
    inbox.roll()
    later = time.monotonic() + 3601
    monkeypatch.setattr("assay.poc.validator.inbox.time.monotonic", lambda: later)
    real = inbox.database.write

    @contextmanager
    def write():
        with real() as connection:
            yield connection
            raise OSError("the disk is full")

    with monkeypatch.context() as full, suppress(OSError):
        full.setattr(inbox.database, "write", write)
        inbox.roll()
    inbox.roll()
    assert inbox.epochs(10)[-1]["ends"] is not None


def test_the_commitment_is_the_hash_of_secret_and_number():
    epoch = Epoch(7, b"s" * 32, 1.0, 2.0)
    assert (
        epoch.public()["commitment"] == hashlib.sha256(b"s" * 32 + bytes(7) + b"\x07").hexdigest()
    )
    assert epoch.public()["secret"] == (b"s" * 32).hex()
    assert Epoch(7, b"s" * 32, 1.0, None).public()["secret"] is None


def test_every_place_is_as_likely_as_any_other():
    """Over secrets that a node does not know, no position of a message is safer than another."""
    nonces = list(range(0, 120, 3))
    counts = np.zeros(len(nonces), dtype=int)
    for i in range(2000):
        seed = message_seed(i.to_bytes(32, "big"), "node_A", "msg_1", b"d" * 32)
        counts[draw(seed, nonces, 0, 8)] += 1
    assert counts.sum() == 16_000
    assert distributions.chisquare(counts).pvalue > 1e-4


def test_a_nonce_is_as_likely_in_a_message_of_any_size(inbox):
    """A node that hides what it invents in one large message, among many of one honest nonce, gains
    nothing.
    """
    sizes = {1: 2000, 50: 40, 1000: 2}
    inbox.add(
        [
            _message(f"{nonces}/{i}", nonces=nonces)
            for nonces, count in sizes.items()
            for i in range(count)
        ]
    )
    drawn = dict.fromkeys(sizes, 0)
    while sum(drawn.values()) < 600:
        draws = inbox.plan(["node_A"] * 20, 60)
        for found in draws:
            drawn[int(found.id.partition("/")[0])] += found.planned - found.drawn
        inbox.finish(draws)
    # About 200 of each, with a standard deviation of 24 at most. Without regard to the size, 500
    # are of the first kind.
    assert all(90 <= count <= 310 for count in drawn.values()), drawn


def test_the_room_of_a_node_is_counted_over_restarts_and_deletions(inbox, opened):
    inbox.add(
        [
            _message("a", body=b"x" * 60),
            _message("a", body=b"x" * 60),
            _message("b", body=b"x" * 30),
        ]
    )
    inbox.close()
    again = opened(most=100)
    assert not again.is_full("node_A", 10)
    assert again.is_full("node_A", 11)
    assert not again.is_full("node_B", 100)
    assert again.prune(0.0) == 2
    assert not again.is_full("node_A", 100)


def test_no_node_alone_can_fill_a_disk_and_who_sent_little_is_let_in(inbox, monkeypatch):
    """A bound of 4 GiB a node bounds nothing on a disk that has less."""
    disk = 24 * 2**20
    usage = SimpleNamespace(total=disk, free=disk)
    monkeypatch.setattr("assay.poc.net.shares.shutil.disk_usage", lambda path: usage)
    sent = dict.fromkeys("ABC", 0)
    for i in range(300):
        for key in sent:
            if not inbox.is_full(key, 2**19):
                inbox.add([_message(f"{key}{i}", key, body=bytes(2**19))])
                sent[key] += 1
            usage.free = disk - 2**19 * sum(sent.values())
            inbox.roll()
    assert min(sent.values()) == max(sent.values()) > 0
    assert usage.free > disk // 4
    assert not inbox.is_full("D", 2**20)


def test_the_seed_binds_secret_key_id_and_content():
    base = (b"s" * 32, "node_A", "msg_1", b"d" * 32)
    others = [
        (b"t" * 32, *base[1:]),
        (base[0], "node_B", *base[2:]),
        (*base[:2], "msg_2", base[3]),
        (*base[:3], b"e" * 32),
    ]
    others.append((base[0], "node_Am", "sg_1", base[3]))
    seeds = {message_seed(*values) for values in [base, *others]}
    assert len(seeds) == len(others) + 1
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_further_draws_continue_the_order():
    nonces = list(range(50))
    whole = draw(5, nonces, 0, 50)
    assert sorted(whole) == nonces
    assert draw(5, nonces, 0, 8) + draw(5, nonces, 8, 20) == whole[:20]


def test_anyone_draws_the_sample_of_a_finished_epoch_again(validating, small_model):
    """The ledger's nonces are the first ones of the order that the published secret gives: no other
    were possible.
    """
    text = (Path(__file__).parents[3] / "docs" / "validator.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    page: dict = {}
    exec(code, page)
    body = body_of(proof_of(small_model, "node_A", range(60)))
    with validating(epoch=1.0, nonces_per_hour=60_000, sample=5) as running:
        published = {
            row["epoch"]: row["commitment"] for row in running.get("/commitments")["commitments"]
        }
        running.send(body, id="msg_x")
        until(lambda: running.node("node_A")["recorded"] >= 10)
        account = running.node("node_A")["account"]
        until(lambda: running.get("/commitments")["commitments"][-2]["secret"] is not None)
        entries = running.get(f"/evidence/{account}")["entries"]
        checked = [nonce for entry in entries for nonce in entry["nonces"]]
        revealed = [
            row for row in running.get("/commitments")["commitments"] if row["secret"] is not None
        ]
        assert {row["commitment"] for row in revealed} & set(published.values())
        orders = [
            page["order"](
                bytes.fromhex(row["secret"]),
                "node_A",
                "msg_x",
                json.dumps(body).encode(),
                body["nonces"],
            )
            for row in revealed
            if commitment(bytes.fromhex(row["secret"]), row["epoch"]) == row["commitment"]
        ]
        assert checked in [order[: len(checked)] for order in orders]


def test_commitments_need_no_key_and_show_no_secret_that_is_used(validating):
    with validating(service={"api_keys": ("k" * 20,)}) as running:
        assert running.client.get("/api/v1/validator/nodes").status_code == 401
        found = running.get("/commitments")
        assert found["ledger"] == dict(
            zip(("entries", "head"), running.controller.ledger.head, strict=True)
        )
        found = found["commitments"]
        assert [row["secret"] for row in found] == [None, None]
