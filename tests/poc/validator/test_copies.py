"""What is drawn is a nonce of a round: copies, under whatever ids, take no draw from another nonce."""

import json
import math
import random
from collections import Counter
from contextlib import ExitStack, closing
from itertools import chain, repeat
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from assay.files.sqlite import Database
from assay.poc import Round, get_pipeline
from assay.poc.validator.claims import Claim, named_nonces
from assay.poc.validator.epochs import draw
from assay.poc.validator.inbox import MIGRATIONS, NAME, Inbox, Message
from assay.poc.validator.inbox_writer import InboxWriter
from assay.poc.validator.validator_metrics import ValidatorMetrics
from tests.poc.validator.conftest import BLOCK, body_of, proof_of
from tests.waiting import until

SAMPLE = 8
CHEAP = range(0, 150, 3)
HONEST = range(300, 450, 3)


@pytest.fixture
def opened(tmp_path):
    """Open the inbox of a directory; what was opened is closed."""
    with ExitStack() as made:
        yield lambda **how: made.enter_context(
            closing(Inbox(tmp_path, epoch_seconds=3600.0, sample=SAMPLE, **how))
        )


def message(id, nonces, *, key="node_A", kind="generated", block=BLOCK, **round) -> Message:
    """A message of a claim whose values are the nonces themselves, over a thousand."""
    about = {"block_height": 7, "seq_len": 8, "r_target": 1.416, "node_count": 3} | round
    claim = Claim(
        Round(block_hash=block, public_key=key, **about), [*nonces], [n / 1000 for n in nonces]
    )
    return Message(key, id, kind, len(nonces), f"{id}".encode(), claim.encode(), "pins")


def passes(inbox, most=SAMPLE) -> list[list[int]]:
    """Return the nonces of each pass until nothing is left to draw."""
    pipeline = get_pipeline("poc-2.0")
    found = []
    while draws := inbox.plan(["node_A"], most):
        nonces = []
        for one in draws:
            claim = Claim.decode(one.claim, one.nonces, pipeline)
            assert [*claim.values] == [nonce / 1000 for nonce in claim.nonces]
            places = draw(one.seed, claim.nonces, one.drawn, one.planned)
            nonces += [claim.nonces[place] for place in places]
        found.append(nonces)
        inbox.finish(draws)
    return found


def flat(found: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(found))


def copies(count, new=0):
    """Return copies of the honest message, each with so many nonces that no other message has."""
    return [
        message(f"copy{i}", [*HONEST, *range(3000 + 3 * i * new, 3000 + 3 * (i + 1) * new, 3)])
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 9, 99])
@pytest.mark.parametrize("order", ["before", "after", "between", "each alone"])
def test_copies_take_no_draws_and_no_passes(opened, count, order):
    inbox = opened()
    originals = [message("cheap", CHEAP), message("honest", HONEST)]
    sent = [*copies(count), *originals] if order == "before" else [*originals, *copies(count)]
    if order == "between":
        random.Random(count).shuffle(sent)
    for part in [[one] for one in sent] if order == "each alone" else [sent]:
        assert inbox.add(part) == [True] * len(part)
    found = passes(inbox)
    assert sorted(flat(found)) == [*CHEAP, *HONEST]
    assert len(found) == math.ceil((len(CHEAP) + len(HONEST)) / SAMPLE)
    assert inbox.senders()["node_A"]["nonces"] == len(CHEAP) + len(HONEST)


@pytest.mark.parametrize("count", [1, 9, 99])
def test_a_new_nonce_beside_copies_is_one_more_nonce_to_draw_and_no_more(opened, count):
    inbox = opened()
    inbox.add([message("cheap", CHEAP), message("honest", HONEST), *copies(count, new=1)])
    found = passes(inbox)
    nonces = flat(found)
    assert len(nonces) == len(set(nonces)) == len(CHEAP) + len(HONEST) + count
    assert len(found) == math.ceil(len(nonces) / SAMPLE)


def test_many_small_messages_are_drawn_from_as_fast_as_a_large_one(opened):
    """A turn that drew from one message only took eight passes for eight messages of one nonce."""
    inbox = opened()
    inbox.add([message(f"m{nonce}", [nonce]) for nonce in CHEAP])
    found = passes(inbox)
    assert sorted(flat(found)) == [*CHEAP]
    assert len(found) == math.ceil(len(CHEAP) / SAMPLE)


def test_claims_in_another_form_are_copies_where_they_are_equal(opened):
    inbox = opened()
    sent = {"cheap": b"c", **{f"copy{number}": b"h" for number in range(20)}}
    inbox.add(
        [
            Message("node_A", name, "generated", 50, claim, claim, "p")
            for name, claim in sent.items()
        ]
    )
    drawn = Counter()
    while draws := inbox.plan(["node_A"], SAMPLE):
        drawn.update({one.claim: one.planned - one.drawn for one in draws})
        inbox.finish(draws)
    assert drawn == {b"c": 50, b"h": 50}


def test_a_draw_never_takes_more_than_may_be_spent(opened):
    inbox = opened()
    inbox.add([message(f"m{i}", range(1000 * i, 1000 * i + 15, 3)) for i in range(9)])
    for most in (1, 5, 13):
        draws = inbox.plan(["node_A", "node_A"], most)
        assert sum(one.planned - one.drawn for one in draws) == most
        inbox.finish(draws)


def test_restarts_and_epochs_make_no_nonce_new(opened):
    for name in ("first", "second"):
        inbox = opened()
        inbox.epoch_seconds = 0.0
        inbox.roll()
        inbox.add([message(name, HONEST)])
        drawn = flat(passes(inbox))
        assert sorted(drawn) == ([*HONEST] if name == "first" else [])
        inbox.close()


@pytest.mark.parametrize(
    "other",
    [
        {"kind": "proof"},
        {"kind": "pulled"},
        {"node_id": 1},
        {"node_count": 6},
        {"block_height": 8},
        {"model": "other"},
        {"r_target": 1.4},
    ],
    ids=str,
)
def test_what_no_number_depends_on_makes_no_nonce_new(opened, other):
    inbox = opened()
    inbox.add([message("one", HONEST), message("two", HONEST, **other)])
    assert len(flat(passes(inbox))) == len(HONEST)


@pytest.mark.parametrize("other", [{"block": "block_Alpha"}, {"seq_len": 16}, {"strength": 256}])
def test_another_computation_is_a_new_nonce(opened, other):
    inbox = opened()
    inbox.add([message("one", HONEST), message("two", HONEST, **other)])
    assert len(flat(passes(inbox))) == 2 * len(HONEST)


def test_a_nonce_of_one_key_is_not_that_of_another(opened):
    inbox = opened()
    inbox.add([message("one", HONEST), message("one", HONEST, key="node_a")])
    assert len(flat(passes(inbox))) == len(HONEST)
    assert inbox.waiting() == ["node_a"]


def test_nonces_are_known_for_as_long_as_their_block_is_open(opened):
    inbox = opened()
    inbox.add([message("one", HONEST)])
    passes(inbox)
    assert inbox.prune(-1, [BLOCK]) == 1
    inbox.add([message("two", HONEST)])
    assert passes(inbox) == []
    assert inbox.prune(-1, [BLOCK]) == 1
    inbox.prune(-1)
    inbox.add([message("three", HONEST)])
    assert len(flat(passes(inbox))) == len(HONEST)


@pytest.mark.parametrize("forgotten", [7, 50_000])
def test_as_many_rounds_are_forgotten_as_a_network_has(opened, monkeypatch, forgotten):
    """One round of one node in five seconds was forgotten: a file of many nodes only grew."""
    monkeypatch.setattr("assay.poc.validator.inbox.FORGOTTEN", forgotten)
    inbox = opened(most=30_000)
    keys = [f"node_{number}" for number in range(20)]
    for block in ("block_beta", BLOCK):
        inbox.add([message(block, CHEAP, key=key, block=block) for key in keys])

    def remembered() -> list[tuple[str, int, int]]:
        nonces = "SELECT count(*) FROM round_nonces WHERE node_round = node_rounds.id"
        query = f"SELECT block_hash, nonces, ({nonces}) FROM node_rounds ORDER BY id"
        with inbox.database.read() as connection:
            return [tuple(row) for row in connection.exec_driver_sql(query)]

    whole = [(BLOCK, len(CHEAP), len(CHEAP))] * len(keys)
    least = min(forgotten, len(CHEAP) * len(keys))
    for _ in range(math.ceil(len(CHEAP) * len(keys) / least)):
        inbox.prune(-1, [BLOCK])
        assert all(stated == there for _, stated, there in remembered())
        assert remembered()[-len(keys) :] == whole
    assert remembered() == whole
    # The room of what is still remembered, 800 bytes, is all that a node has used.
    assert not inbox.is_full(keys[0], 29_200)
    assert inbox.is_full(keys[0], 29_201)


def test_what_a_deletion_leaves_waits_for_no_further_one(opened, monkeypatch):
    """A part of it every five seconds was less than what arrives, so that a file only grew."""
    monkeypatch.setattr("assay.poc.validator.inbox.FORGOTTEN", 7)
    monkeypatch.setattr("assay.poc.net.runtime.TICK", 0.01)
    seconds = chain([0.0], repeat(60.0))  # after the first deletion the clock stands still
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr("assay.poc.validator.inbox_writer.time", clock)
    inbox = opened()
    inbox.add([message("one", HONEST)])
    writer = InboxWriter(inbox, ValidatorMetrics(), most=1, keep=-1, open_blocks=list)
    writer.start()
    until(lambda: not inbox.database.rows(sa.select(inbox.database["round_nonces"])))
    writer.close()


def test_the_room_of_nonces_is_counted_and_given_back(opened):
    inbox = opened()
    inbox.add([message("one", range(0, 3000, 3))])
    inbox.close()
    inbox = opened(most=30_000)
    assert inbox.prune(-1, [BLOCK]) == 1
    assert not inbox.is_full("node_A", 10_000)
    assert inbox.is_full("node_A", 20_000)
    inbox.prune(-1)
    assert not inbox.is_full("node_A", 30_000)


def test_an_inbox_of_an_earlier_version_opens_and_draws_every_nonce_once(tmp_path, opened):
    """One copy was drawn from in part, and one is being recomputed: both stay as they are."""
    texts = [message("cheap", CHEAP), message("honest", HONEST), *copies(9)]
    planned = {"copy0": (16, 16), "copy1": (0, 8)}
    with (
        closing(Database(tmp_path, name=NAME, migrations=MIGRATIONS[:1])) as database,
        database.write() as connection,
    ):
        row = ("node_A", 0.0, 0.0, 11, 550, 0)
        connection.exec_driver_sql("INSERT INTO senders VALUES (1, ?, ?, ?, ?, ?, ?)", row)
        for seed, one in enumerate(texts, start=1):
            drawn, planned_to = planned.get(one.id, (0, 0))
            values = (one.id, seed, one.nonces, drawn, planned_to, one.claim, one.body)
            connection.exec_driver_sql(
                "INSERT INTO inbox (sender, id, kind, at, epoch, seed, digest, nonces, drawn, "
                "planned, turn, claim, pins, body) "
                "VALUES (1, ?, 'generated', 1, 1, ?, x'00', ?, ?, ?, .5, ?, 'pins', ?)",
                values,
            )
    before = {
        id: [
            HONEST[place] for place in draw(texts.index(one) + 1, [*HONEST], 0, planned[one.id][1])
        ]
        for one in texts
        if (id := one.id) in planned
    }
    inbox = opened()
    (unfinished,) = inbox.unfinished(10)
    assert unfinished.id == "copy1"
    nonces = named_nonces(unfinished.claim, unfinished.nonces)[2]
    places = draw(unfinished.seed, nonces, 0, 8)
    assert [nonces[place] for place in places] == before["copy1"]
    inbox.finish([unfinished])
    left = flat(passes(inbox))
    assert sorted(left) == sorted({*CHEAP, *HONEST} - {*before["copy0"], *before["copy1"]})


@pytest.mark.slow
def test_copies_cost_a_validator_no_pass_and_hide_no_lie(validating, small_model):
    honest = body_of(proof_of(small_model, "node_A", range(100)))
    with validating() as running:
        for i in range(30):
            running.send(honest, id=f"copy{i}")
            running.send(json.dumps(honest) + " " * i, key="node_A", id=f"padded{i}")
        until(lambda: running.node("node_A")["recorded"] == len(honest["nonces"]))
        running.send_lies(
            "node_A",
            lambda body: body | {"dist": [d - 0.004 for d in body["dist"]]},
            range(100, 300),
        )
        for i in range(30):
            running.send(honest, id=f"later{i}")
        until(lambda: running.verdict("node_A") == "fraud")
        node = running.node("node_A")
        assert node["recorded"] == node["checked"]
        assert node["messages"] == 92


@pytest.mark.parametrize("field", ["block_hash", "public_key"])
def test_another_spelling_of_a_block_or_key_is_refused(validating, small_model, field):
    body = body_of(proof_of(small_model, "node_A", range(60)))
    with validating() as running:
        for text in (body[field].upper(), body[field] + " ", body[field] + "\u200b"):
            status = 403 if field == "public_key" else 422
            refusal = running.send(body | {field: text}, key="node_A", status=status)
            assert refusal["fields"] == [field]
