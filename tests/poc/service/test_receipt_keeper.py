"""The keeper of receipts: what waits is bounded, a full disk refuses, and the end stores what
waits.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
    """A keeper, an event that says that its thread waits for the disk, and one that lets it
    write.
    """
    settings = ServiceSettings(data_dir=tmp_path, max_receipts=3)
    database = open_database(tmp_path)
    keeper = ReceiptKeeper(database, Outbox(database), settings, Metrics())
    begun = threading.Event()
    go = threading.Event()
    write = database.write

    @contextmanager
    def slow_write():
        begun.set()
        assert go.wait(20)
        with write() as connection:
            yield connection

    monkeypatch.setattr(database, "write", slow_write)
    yield keeper, begun, go
    go.set()
    keeper.close()
    database.close()


def test_what_waits_is_bounded_and_shares_a_transaction(held):
    keeper, begun, go = held
    sink = keeper.sink(header())

    async def scenario() -> list[object]:
        first = asyncio.create_task(sink.store(receipt("first")))
        await asyncio.sleep(0)
        keeper.start()
        assert await asyncio.to_thread(begun.wait, 20)
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
    keeper, _, go = held
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
    keeper, begun, go = held
    sink = keeper.sink(header())

    async def scenario() -> None:
        first = asyncio.create_task(sink.store(receipt("first")))
        await asyncio.sleep(0)
        keeper.start()
        assert await asyncio.to_thread(begun.wait, 20)
        second = asyncio.create_task(sink.store(receipt("second")))
        await asyncio.sleep(0)
        assert not keeper.close(timeout=0.0)
        with refuses(Refusal, "the end stores what waits and takes nothing more"):
            sink.check()
        go.set()
        async with asyncio.timeout(20):
            await asyncio.gather(first, second)
        with refuses(Refusal, "the end stores what waits and takes nothing more"):
            await sink.store(receipt("late"))

    asyncio.run(scenario())
    assert keeper.close(timeout=20.0)
    assert [entry["request_id"] for entry in keeper.listed(0, 10)] == ["first", "second"]


@contextmanager
def storing(folder: Path) -> Iterator[ReceiptKeeper]:
    """A keeper that stores what it is given, and ends with the block."""
    database = open_database(folder)
    keeper = ReceiptKeeper(database, Outbox(database), ServiceSettings(data_dir=folder), Metrics())
    keeper.start()
    try:
        yield keeper
    finally:
        keeper.close()
        database.close()


def test_what_one_client_has_stored_leaves_room_on_the_disk_for_another(tmp_path, monkeypatch):
    size = len(receipt("a0").without_prompt().line())
    room = SimpleNamespace(total=0, used=0, free=9 * size)
    monkeypatch.setattr("assay.poc.net.shares.shutil.disk_usage", lambda path: room)

    def put(keeper: ReceiptKeeper, name: str, client: str | None) -> None:
        asyncio.run(keeper.sink(header()).store(receipt(name), client=client))
        room.free -= size

    def refused_to_a(keeper: ReceiptKeeper) -> None:
        with refuses(Refusal, "what one client has stored leaves room on the disk for another"):
            put(keeper, "a4", "a")

    with storing(tmp_path) as keeper:
        for number in range(4):
            put(keeper, f"a{number}", "a")
        refused_to_a(keeper)
        put(keeper, "b0", "b")
        put(keeper, "c0", None)
    with storing(tmp_path) as keeper:  # after a restart
        refused_to_a(keeper)
        put(keeper, "d0", "d")
        put(keeper, "c1", None)
        # Room for a fourth receipt of this client, and for no fifth.
        room.free = 11 * size // 2
        refused_to_a(keeper)
        assert keeper.delete("a0") == 1
        put(keeper, "a4", "a")
        names = [entry["request_id"] for entry in keeper.listed(0, 100)]
    assert names == ["a1", "a2", "a3", "b0", "c0", "d0", "c1", "a4"]


def test_what_one_client_has_waiting_leaves_room_for_another(service):
    """In places, and in bytes where anything waits."""
    controller = service.controller
    keeper = ReceiptKeeper(
        controller.database, controller.outbox, ServiceSettings(max_receipts=6), Metrics()
    )
    sink = keeper.sink(header())
    large = NewReceipt(header().line(), receipt("b"), receipt("b").line(), "b")

    async def fill() -> None:
        stores = [asyncio.create_task(sink.store(receipt(f"a{i}"), client="a")) for i in range(3)]
        await asyncio.sleep(0)
        with refuses(Refusal, "what one client has waiting leaves room for another"):
            sink.check("a")
        with refuses(Refusal, "what one client has waiting leaves room for another"):
            await keeper.put(large, size=2**25 + 1, client="b")
        stores.append(asyncio.create_task(sink.store(receipt("b"), client="b")))
        await asyncio.sleep(0)
        keeper.start()
        await asyncio.gather(*stores)
        sink.check("a")

    try:
        asyncio.run(fill())
    finally:
        keeper.close()
