"""The keeper of receipts: what waits is bounded, a full disk refuses, and the end stores what
waits.
"""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from assay.poc.net.refusals import Refusal
from assay.poc.service import ServiceSettings
from assay.poc.service.database import open_database
from assay.poc.service.outbox import Outbox
from assay.poc.service.receipt_keeper import NewReceipt, ReceiptKeeper
from assay.poc.service.service_metrics import Metrics
from tests.poc.service.conftest import cap
from tests.poc.service.receipts import get, header, receipt, store
from tests.waiting import until
from tests.wordings import refuses


def test_a_full_disk_refuses_responses_until_there_is_room(service):
    sink = service.controller.receipts.sink(header())
    store(service, receipt("before"))
    limit = cap(service.controller.database)
    kept = []
    refused = None
    for i in range(1000):
        try:
            store(service, receipt(f"chat-{i}", output=tuple(range(1000))))
            kept.append(f"chat-{i}")
        except Refusal as error:
            refused = error
            break
    assert (refused.status, refused.retry_after) == (503, 1)
    until(lambda: "assay_poc_receipts_failing 1.0" in service.client.get("/metrics").text)
    with refuses(Refusal, "a full disk refuses responses until there is room"):
        sink.check()
    found = [entry["request_id"] for entry in get(service, "", limit=1000)["receipts"]]
    assert found == ["before", *kept]  # none of the refused transaction
    assert service.client.get("/health").status_code == 200
    limit[0] = 2**30
    until(lambda: not service.controller.receipts.failing)
    sink.check()
    store(service, receipt("after"))
    assert get(service, "/after")
    assert "assay_poc_receipts_failing 0.0" in service.client.get("/metrics").text
    assert "assay_poc_receipts_refused_total 1.0" in service.client.get("/metrics").text


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A keeper whose disk is slow until the event is set."""
    settings = ServiceSettings(data_dir=tmp_path, max_receipts=3)
    database = open_database(tmp_path)
    keeper = ReceiptKeeper(database, Outbox(database), settings, Metrics())
    go = threading.Event()
    real = keeper._write

    def add(receipts):
        assert go.wait(20)
        return real(receipts)

    monkeypatch.setattr(keeper, "_write", add)
    yield keeper, go
    go.set()
    keeper.close()
    database.close()


def test_what_waits_is_bounded_and_shares_a_transaction(held, monkeypatch):
    keeper, go = held
    sink = keeper.sink(header())

    async def scenario() -> list[object]:
        first = asyncio.create_task(sink.store(receipt("first")))
        await asyncio.sleep(0)
        keeper.start()
        while keeper._queue:
            await asyncio.sleep(0.01)
        more = [asyncio.create_task(sink.store(receipt(f"chat-{i}"))) for i in range(4)]
        await asyncio.sleep(0)
        with refuses(Refusal, "what waits is bounded and shares a transaction"):
            sink.check()
        go.set()
        return await asyncio.gather(first, *more, return_exceptions=True)

    outcome = asyncio.run(scenario())
    assert [isinstance(each, Refusal) for each in outcome] == [False, False, False, False, True]
    times = [entry["stored_at"] for entry in keeper.listed(0, 10)]
    assert len(times) == 4
    assert times[1] == times[2] == times[3]


def test_a_client_that_leaves_still_has_its_receipt(held):
    keeper, go = held
    sink = keeper.sink(header())

    async def scenario() -> None:
        task = asyncio.create_task(sink.store(receipt("chat")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    keeper.start()
    go.set()
    until(lambda: keeper.listed(0, 10))


def test_the_end_stores_what_waits_and_takes_nothing_more(held):
    keeper, go = held
    sink = keeper.sink(header())

    async def scenario() -> None:
        task = asyncio.create_task(sink.store(receipt("chat")))
        await asyncio.sleep(0)
        keeper.start()
        go.set()
        await asyncio.to_thread(keeper.close)
        await task
        with refuses(Refusal, "the end stores what waits and takes nothing more"):
            await sink.store(receipt("late"))

    asyncio.run(scenario())
    assert [entry["request_id"] for entry in keeper.listed(0, 10)] == ["chat"]


def test_what_one_client_has_stored_leaves_room_on_the_disk_for_another(tmp_path, monkeypatch):
    room = SimpleNamespace(total=0, used=0, free=30_000)
    monkeypatch.setattr("assay.poc.net.shares.shutil.disk_usage", lambda path: room)
    database = open_database(tmp_path)

    def keeper() -> ReceiptKeeper:
        return ReceiptKeeper(
            database, Outbox(database), ServiceSettings(data_dir=tmp_path), Metrics()
        )

    def put(keeper: ReceiptKeeper, name: str, client: str | None) -> None:
        line = receipt(name).line() + " " * 3000
        keeper._check_room(client, len(line))
        assert keeper._write([NewReceipt(header().line(), receipt(name), line, client)]) == [True]
        room.free -= len(line)
        keeper._rest(True)

    first = keeper()
    for number in range(4):
        put(first, f"a{number}", "a")
    for again in (first, keeper()):  # and after a restart
        with refuses(Refusal, "what one client has stored leaves room on the disk for another"):
            put(again, "a", "a")
        put(again, f"b{again is first}", f"b{again is first}")
        put(again, f"c{again is first}", None)
    assert again.delete("a0") == 1
    room.free += 20_000
    again._rest(False)  # sees that
    put(again, "a", "a")
    database.close()


def test_what_one_client_has_waiting_leaves_room_for_another(service):
    """In places, and in bytes where anything waits."""
    controller = service.controller
    keeper = ReceiptKeeper(
        controller.database, controller.outbox, ServiceSettings(max_receipts=6), Metrics()
    )
    sink = keeper.sink(header())

    async def fill() -> None:
        stores = [asyncio.create_task(sink.store(receipt(f"a{i}"), client="a")) for i in range(3)]
        await asyncio.sleep(0)
        with refuses(Refusal, "what one client has waiting leaves room for another"):
            sink.check("a")
        with refuses(Refusal, "what one client has waiting leaves room for another"):
            await keeper.put(keeper._queue[0][0], size=2**25 + 1, client="b")
        stores.append(asyncio.create_task(sink.store(receipt("b"), client="b")))
        await asyncio.sleep(0)
        keeper.start()
        await asyncio.gather(*stores)
        sink.check("a")

    try:
        asyncio.run(fill())
    finally:
        keeper.close()
