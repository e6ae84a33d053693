"""Receipts as a file: complete pages, none twice, so many at once."""

import threading

import pytest

from assay.errors import StorageError
from assay.poc.responses import Receipts
from assay.poc.service import receipts as _receipts
from tests.poc.service.receipts import RECEIPTS, files, get, header, receipt, store
from tests.waiting import until


def test_a_file_of_receipts_is_complete_and_pages_follow_each_other(service):
    assert files(service) == []
    made = [receipt(f"chat-{i}") for i in range(25)]
    store(service, *made)
    found = files(service, limit=10)
    assert [len(file.receipts) for file in found] == [10, 10, 5]
    assert [each.line() for file in found for each in file.receipts] == [each.without_prompt().line() for each in made]
    assert found[0].header == header()
    (whole,) = files(service)
    assert (whole.footer.receipts, whole.footer.tokens) == (25, 1000)


def test_a_file_has_one_header_and_no_response_twice(service):
    store(service, receipt("a"), receipt("b"))
    store(service, receipt("c"), under=header(public_key="node_B"))
    store(service, receipt("a"), receipt("a", output=(1, 2)), receipt("d"))
    found = [(file.header.public_key, [each.request_id for each in file.receipts]) for file in files(service)]
    assert found == [("node_A", ["a", "b"]), ("node_B", ["c"]), ("node_A", ["a", "d"])]


def test_a_file_of_one_request(service):
    store(service, receipt("a"), receipt("b", index=1), receipt("b"), receipt("c"))
    (found,) = files(service, request_id="b")
    assert [(each.request_id, each.index) for each in found.receipts] == [("b", 1), ("b", 0)]
    assert files(service, request_id="x") == []


def test_a_file_is_bounded_and_read_in_parts(service, monkeypatch):
    made = [receipt(f"chat-{i:02}") for i in range(20)]
    size = len(made[0].without_prompt().line())
    monkeypatch.setattr(_receipts, "MOST_BYTES", size * 8)
    monkeypatch.setattr(_receipts, "_CHUNK_BYTES", size * 3)
    store(service, *made)
    assert sorted(len(file.receipts) for file in files(service)) == [4, 8, 8]
    get(service, "/chat-01")
    monkeypatch.setattr(_receipts, "MOST_BYTES", size // 2)
    assert "index" in get(service, "/chat-01", 413)["do"]
    assert len(files(service)) == 20  # a receipt that is larger than a file may be stands alone


def test_what_is_deleted_while_a_file_is_sent_is_missing_from_it(service, monkeypatch):
    monkeypatch.setattr(_receipts, "_CHUNK_BYTES", 1)
    store(service, *(receipt(f"chat-{i}") for i in range(6)))
    real = service.controller.receipts.lines

    def lines(low, high, **more):
        if low == 2:
            service.controller.receipts.delete("chat-4")
        return real(low, high, **more)

    monkeypatch.setattr(service.controller.receipts, "lines", lines)
    (found,) = files(service)
    assert [each.request_id for each in found.receipts] == [f"chat-{i}" for i in (0, 1, 2, 3, 5)]


def test_a_file_whose_reading_fails_has_no_footer(service, monkeypatch):
    monkeypatch.setattr(_receipts, "_CHUNK_BYTES", 1)
    store(service, receipt("a"), receipt("b"))
    real = service.controller.receipts.lines

    def lines(low, high, **more):
        if low:
            raise StorageError("gone", wanted="a file", do="wait")
        return real(low, high, **more)

    monkeypatch.setattr(service.controller.receipts, "lines", lines)
    answer = service.client.get(f"{RECEIPTS}.jsonl")
    with pytest.raises(Exception, match="truncated"):
        Receipts.parse("export", answer.content)


def test_files_that_are_asked_for_at_once_are_counted(service, monkeypatch):
    monkeypatch.setattr("assay.poc.service.receipts.MOST_FILES", 1)
    store(service, receipt("a"))
    receipts, both, go = service.controller.receipts, threading.Barrier(2), threading.Event()
    page, lines = receipts.page, receipts.lines

    def paged(*given, **more):
        both.wait(20)
        return page(*given, **more)

    def read(*given, **more):
        assert go.wait(20)
        return lines(*given, **more)

    monkeypatch.setattr(receipts, "page", paged)
    monkeypatch.setattr(receipts, "lines", read)
    answers = []
    calls = [threading.Thread(target=lambda: answers.append(service.client.get(f"{RECEIPTS}.jsonl"))) for _ in "ab"]
    for call in calls:
        call.start()
    try:
        until(lambda: answers)
    finally:
        go.set()
        for call in calls:
            call.join()
    assert [answer.status_code for answer in answers] == [429, 200]
    assert len(Receipts.parse("export", answers[1].content).receipts) == 1
