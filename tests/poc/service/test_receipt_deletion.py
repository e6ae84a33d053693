"""Receipts that are deleted, by hand or by age: nothing of them is left on the disk."""

import hashlib
import sqlite3
import time

import sqlalchemy as sa

from assay.poc.service import receipts as _receipts
from tests.end_to_end.receiver import FlakyReceiver
from tests.poc.service.receipts import RECEIPTS, files, get, on_disk, receipt, store
from tests.waiting import until


def secret(number: int) -> str:
    return f"secret-{hashlib.sha256(str(number).encode()).hexdigest()}"


def test_a_deletion_leaves_nothing_behind_and_others_stay(serving):
    receiver = FlakyReceiver(trouble=1.0)
    receiver.close()  # callbacks stay undelivered
    with serving(receipt_callback_url=receiver.url, callback_attempts=1000) as service:
        made = [receipt(secret(i), user_seed=secret(1000 + i), output=tuple(range(1 + i % 90))) for i in range(300)]
        for start in range(0, 300, 50):
            store(service, *made[start : start + 50])
        gone = {i for i in range(300) if i % 3 != 1}
        assert all(secret(i).encode() in on_disk(service) for i in gone)
        for i in sorted(gone, key=secret):
            assert service.client.delete(f"{RECEIPTS}/{secret(i)}").json() == {"deleted": 1}
        left = on_disk(service)
        assert not [i for i in gone if secret(i).encode() in left or secret(1000 + i).encode() in left]
        (file,) = files(service)
        assert [each.request_id for each in file.receipts] == [secret(i) for i in range(300) if i not in gone]
        assert 'receipts_deleted_total{reason="request"} 200.0' in service.client.get("/metrics").text


def test_a_reader_delays_the_emptying_of_the_journal_only(service):
    store(service, receipt(secret(1)))
    with sqlite3.connect(service.controller.database.path) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM receipts").fetchall()
        assert service.client.delete(f"{RECEIPTS}/{secret(1)}").status_code == 200
        assert secret(1).encode() in on_disk(service)
    reader.close()
    until(lambda: secret(1).encode() not in on_disk(service))


def test_one_choice_is_deleted_and_callbacks_lose_it(serving):
    with serving(receipt_callback_url="http://127.0.0.1:9/", callback_interval=1000.0) as service:
        store(service, *(receipt("chat", index=index) for index in range(3)))
        outbox, c = service.controller.outbox, service.controller.outbox._c
        service.controller.database.change(outbox._table.update().values(status="pending"))
        assert service.client.delete(f"{RECEIPTS}/chat", params={"index": 1}).json() == {"deleted": 1}
        assert [each["receipt"]["index"] for each in get(service, "/chat")["receipts"]] == [0, 2]
        query = sa.select(*outbox._columns).where(c.kind == "receipts")
        with service.controller.database.read() as connection:
            body = outbox._receipts(connection, connection.execute(query).one())
        assert [each["index"] for each in body["receipts"]] == [0, 2]
        service.client.delete(f"{RECEIPTS}/chat")
        assert outbox.counts() == {"pending": 0, "dead": 0}


def test_old_receipts_are_deleted_and_a_clock_that_jumps_deletes_nothing(service, monkeypatch):
    store(service, *(receipt(f"chat-{i}") for i in range(7)))
    keeper, day = service.controller.receipts, 86_400.0
    with service.controller.database.write() as connection:
        connection.exec_driver_sql("UPDATE receipts SET at = at - ? WHERE seq <= 5", (29 * day,))
    monkeypatch.setattr(_receipts, "_PRUNED", 3)
    assert keeper.prune(30 * day) == 0
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 400 * day)
        assert keeper.prune(30 * day) == 0
    assert [keeper.prune(28 * day) for _ in range(3)] == [3, 2, 0]
    assert [entry["request_id"] for entry in get(service, "")["receipts"]] == ["chat-5", "chat-6"]


def test_a_service_deletes_what_is_old_by_itself(serving):
    with serving() as service:
        store(service, receipt(secret(1)), receipt("young"))
        until(lambda: service.controller.receipts._pruned_at > 0)
        with service.controller.database.write() as connection:
            connection.exec_driver_sql("UPDATE receipts SET at = at - ? WHERE seq = 1", (31 * 86_400.0,))
        service.restart()
        until(lambda: len(get(service, "")["receipts"]) == 1)
        until(lambda: secret(1).encode() not in on_disk(service))
        assert 'receipts_deleted_total{reason="age"} 1.0' in service.client.get("/metrics").text
