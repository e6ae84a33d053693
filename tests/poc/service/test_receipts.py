"""Receipts of responses: stored, found, listed, announced, for whom; databases of earlier
versions.
"""

import hashlib
import json
import shutil
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from fastapi import FastAPI

from assay.errors import StorageError, UsageError
from assay.poc.net.refusals import Refusal
from assay.poc.responses import Prompt, Receipts
from assay.poc.service import ServiceSettings, attach
from assay.poc.service import receipt_keeper as _receipts
from assay.poc.service.database import MIGRATIONS
from assay.poc.service.receipt_keeper import ReceiptKeeper
from assay.poc.service.service_controller import Controller
from tests.end_to_end.receiver import FlakyReceiver
from tests.poc.service.conftest import ARTIFACTS, PREFIX, TestClient, execute
from tests.poc.service.receipts import RECEIPTS, files, get, header, on_disk, receipt, store
from tests.waiting import until
from tests.wordings import refuses

FIRST = Path(__file__).parents[2] / "vectors" / "first" / "service" / "service.sqlite3"


def test_a_receipt_is_found_after_a_restart(service):
    store(service, receipt("chat-1"))
    service.restart()
    (found,) = get(service, "/chat-1")["receipts"]
    assert found["header"] == json.loads(header().line())
    wanted = receipt("chat-1").without_prompt()
    assert found["receipt"] == json.loads(wanted.line())
    assert found["sha256"] == hashlib.sha256(wanted.line().encode()).hexdigest()
    assert "no such receipt" in get(service, "/chat-2", 404)["detail"]


def test_each_choice_of_a_request_has_a_receipt(service):
    store(service, *(receipt("chat", index=index) for index in (2, 0, 1)))
    assert [found["receipt"]["index"] for found in get(service, "/chat")["receipts"]] == [0, 1, 2]
    assert [found["receipt"]["index"] for found in get(service, "/chat", index=1)["receipts"]] == [
        1
    ]
    get(service, "/chat", 404, index=3)
    get(service, "/chat", 422, index=-1)


def test_a_receipt_is_kept_once_and_another_of_the_same_request_beside_it(service):
    other = receipt("chat", output=(5, 6, 7))
    store(service, receipt("chat"), receipt("chat"), other)
    store(service, receipt("chat"))
    assert [len(found["receipt"]["output"]) for found in get(service, "/chat")["receipts"]] == [
        40,
        3,
    ]
    text = service.client.get("/metrics").text
    assert 'assay_poc_receipts_total{as="new"} 2.0' in text
    assert 'assay_poc_receipts_total{as="repeated"} 2.0' in text
    store(
        service, receipt("chat"), under=header(digest="1" * 64)
    )  # the same response, of another model
    assert [
        found["header"]["model"]["digest"][0] for found in get(service, "/chat")["receipts"]
    ] == ["0", "0", "1"]


@pytest.mark.parametrize("kept", [False, True])
def test_prompts_are_hashes_unless_the_setting_says_so(serving, kept):
    prompt = [70_001, 70_002, 70_003]
    with serving(receipt_prompts=kept) as service:
        store(service, receipt("chat", prompt=Prompt.of(prompt)))
        found = get(service, "/chat")["receipts"][0]["receipt"]["prompt"]
        assert found == (
            {"ids": prompt} if kept else {"sha256": Prompt.of(prompt).sha256, "tokens": 3}
        )
        assert (b"70001,70002" in on_disk(service)) is kept


def test_a_receipt_that_the_header_does_not_fit_is_refused(service):
    with refuses(UsageError, "a receipt that the header does not fit is refused"):
        store(service, receipt("chat"), under=header(sketched=False))
    get(service, "/chat", 404)


def test_the_list_is_paged(service):
    store(service, *(receipt(f"chat-{i}") for i in range(25)))
    names = []
    after = 0
    while after is not None:
        page = get(service, "", after=after, limit=10)
        names += [entry["request_id"] for entry in page["receipts"]]
        after = page["next"]
    assert names == [f"chat-{i}" for i in range(25)]
    for params in ({"limit": 0}, {"limit": 1001}, {"after": -1}, {"after": 2**63}, {"after": "x"}):
        get(service, "", 422, **params)


# Hostile requests and keys


def test_ids_of_any_form_are_found_and_deleted_and_what_is_no_id_is_unknown(service):
    store(service, receipt("another"))
    names = [
        "a/b",
        "../../etc/passwd",
        "a%b",
        "a?b=c#d",
        "a b",
        "x' OR 1=1 --",
        "é🂡",
        "receipts.jsonl",
        ".jsonl",
    ]
    for request_id in (*names, "{a}", "x" * 1024):
        store(service, receipt(request_id))
        path = f"{RECEIPTS}/{quote(request_id, safe='')}"
        found = service.client.get(path).json()["receipts"]
        assert [each["receipt"]["request_id"] for each in found] == [request_id]
        assert service.client.delete(path).json() == {"deleted": 1}
        assert service.client.get(path).status_code == 404
    for path in ("/", "/%00", "/%ff%fe", "/%ED%A0%80", "/" + "x" * 20_000, "/%2e%2e%2f", "//"):
        for method in ("GET", "DELETE"):
            answer = service.client.request(method, RECEIPTS + path)
            assert (answer.status_code, len(answer.content) < 500) == (404, True), path
    assert get(service, "/another")


def test_keys_read_and_only_some_delete(serving):
    keys = {
        "api": "all-" + "x" * 20,
        "validate": "validate-" + "x" * 20,
        "read": "read-" + "x" * 20,
    }
    with serving(**{f"{name}_keys": (key,) for name, key in keys.items()}) as service:
        store(service, receipt("chat"))

        def status(method: str, path: str, key: str | None) -> int:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return service.client.request(method, RECEIPTS + path, headers=headers).status_code

        for path in ("", ".jsonl", "/chat"):
            assert {status("GET", path, key) for key in keys.values()} == {200}
            assert status("GET", path, None) == status("GET", path, "wrong" * 8) == 401
        assert [
            status("DELETE", "/chat", key) for key in (None, keys["read"], keys["validate"])
        ] == [401, 403, 403]
        assert status("DELETE", "/chat", keys["api"]) == 200


def test_without_keys_other_hosts_get_no_receipts_from_another_application_either(rig, tmp_path):
    host = FastAPI()
    host.get("/v1/models")(lambda: {"data": ["theirs"]})
    attach(host, Controller(rig.deployment, ServiceSettings(data_dir=tmp_path)))
    with TestClient(host, base_url="http://evil.example") as client:
        for path in ("", ".jsonl", "/chat"):
            assert client.get(RECEIPTS + path).status_code == 403
        assert client.delete(f"{RECEIPTS}/chat").status_code == 403
        assert client.get(f"{PREFIX}/status").status_code == 403
        assert client.get("/v1/models").status_code == 200
        assert client.get(RECEIPTS, headers={"Host": "127.0.0.1"}).status_code == 200


# Callbacks


def test_stored_receipts_are_announced(serving):
    with FlakyReceiver(trouble=0.4, patience=0.1, seed=1) as receiver:
        with serving(receipt_callback_url=f"{receiver.url}/hook", callback_nonces=10) as service:
            made = [receipt(f"chat-{i}") for i in range(25)]
            store(service, *made)
            store(service, receipt("other"), under=header(public_key="node_B"))
            until(lambda: service.controller.outbox.counts()["pending"] == 0)
        bodies = list(receiver.taken.values())
        assert all(len(body["receipts"]) <= 10 for body in bodies)
        named = {
            (body["public_key"], each["seq"]): (each["request_id"], each["sha256"])
            for body in bodies
            for each in body["receipts"]
        }
        digest = [
            hashlib.sha256(each.without_prompt().line().encode()).hexdigest() for each in made
        ]
        wanted = {("node_A", i + 1): (f"chat-{i}", digest[i]) for i in range(25)}
        assert {place: named[place] for place in wanted} == wanted
        assert set(named) - set(wanted) == {("node_B", 26)}
        assert {path for path, _, _ in receiver.requests} == {"/hook/receipts"}
        assert not receiver.changed


def test_a_callback_url_that_cannot_be_called_is_refused_at_the_start(rig, tmp_path):
    with refuses(Refusal, "a callback url that cannot be called is refused at the start"):
        Controller(
            rig.deployment,
            ServiceSettings(data_dir=tmp_path, receipt_callback_url="http://169.254.169.254/"),
        )
    controller = Controller(
        rig.deployment, ServiceSettings(data_dir=tmp_path)
    )  # the directory is free again
    controller.start()
    assert controller.loaded.result(30)
    controller.close()


def test_callbacks_of_receipts_do_not_hold_up_artifact_jobs(serving):
    with serving(
        receipt_callback_url="http://127.0.0.1:9/", max_pending_jobs=1, callback_interval=1000.0
    ) as service:
        store(service, receipt("chat"))
        assert service.controller.outbox.counts()["pending"] == 1
        job = ARTIFACTS | {"nonces": [0], "url": "http://127.0.0.1:9/"}
        service.post("/generate", job)


# Databases of earlier versions


def test_a_database_of_the_first_version_takes_receipts(serving, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(FIRST, tmp_path / "data")
    before = execute(FIRST, "SELECT count(*), sum(nonce) FROM records")
    with serving() as service:
        store(service, receipt("chat"))
        assert get(service, "/chat")
        assert service.sql("SELECT count(*), sum(nonce) FROM records") == before
        assert service.sql("SELECT count(*) FROM migrations") == [(len(MIGRATIONS),)]


def test_a_file_of_receipts_is_complete_and_pages_follow_each_other(service):
    assert files(service) == []
    made = [receipt(f"chat-{i}") for i in range(25)]
    store(service, *made)
    found = files(service, limit=10)
    assert [len(file.receipts) for file in found] == [10, 10, 5]
    assert [each.line() for file in found for each in file.receipts] == [
        each.without_prompt().line() for each in made
    ]
    assert found[0].header == header()
    (whole,) = files(service)
    assert (whole.footer.receipts, whole.footer.tokens) == (25, 1000)


@pytest.mark.slow
def test_a_file_has_one_header_and_no_response_twice(service):
    store(service, receipt("a"), receipt("b"))
    store(service, receipt("c"), under=header(public_key="node_B"))
    store(service, receipt("a"), receipt("a", output=(1, 2)), receipt("d"))
    found = [
        (file.header.public_key, [each.request_id for each in file.receipts])
        for file in files(service)
    ]
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
    monkeypatch.setattr(_receipts, "CHUNK_BYTES", size * 3)
    store(service, *made)
    assert sorted(len(file.receipts) for file in files(service)) == [4, 8, 8]
    get(service, "/chat-01")
    monkeypatch.setattr(_receipts, "MOST_BYTES", size // 2)
    assert "index" in get(service, "/chat-01", 413)["do"]
    assert len(files(service)) == 20  # a receipt that is larger than a file may be stands alone


def test_a_file_lacks_what_is_deleted_while_it_is_sent_and_has_no_footer_where_reading_fails(
    service, monkeypatch
):
    monkeypatch.setattr(_receipts, "CHUNK_BYTES", 1)
    store(service, *(receipt(f"chat-{i}") for i in range(6)))
    real = service.controller.receipts.lines
    failing = []

    def lines(low, high, **more):
        if low == 2:
            service.controller.receipts.delete("chat-4")
        if low and failing:
            raise StorageError("gone", wanted="a file", do="wait")
        return real(low, high, **more)

    monkeypatch.setattr(service.controller.receipts, "lines", lines)
    (found,) = files(service)
    assert [each.request_id for each in found.receipts] == [f"chat-{i}" for i in (0, 1, 2, 3, 5)]
    failing.append(True)
    with pytest.raises(Exception, match="truncated"):
        Receipts.parse("export", service.client.get(f"{RECEIPTS}.jsonl").content)


def test_files_that_are_asked_for_at_once_are_counted(serving, monkeypatch):
    monkeypatch.setattr("assay.poc.service.receipt_keeper.OWN_FILES", 1)
    with serving() as service:
        ask_twice(service, monkeypatch)


def ask_twice(service, monkeypatch):
    store(service, receipt("a"))
    receipts = service.controller.receipts
    both = threading.Barrier(2)
    go = threading.Event()
    page = receipts.page
    lines = receipts.lines

    def paged(*given, **more):
        both.wait(20)
        return page(*given, **more)

    def read(*given, **more):
        assert go.wait(20)
        return lines(*given, **more)

    monkeypatch.setattr(receipts, "page", paged)
    monkeypatch.setattr(receipts, "lines", read)
    answers = answers_at_once(service, f"{RECEIPTS}.jsonl", go)
    assert [answer.status_code for answer in answers] == [200, 429]
    assert len(Receipts.parse("export", answers[0].content).receipts) == 1


def answers_at_once(service, path, go):
    """Ask twice, and let reading go on after the first answer; return both by their status."""
    with ThreadPoolExecutor(2) as pool:
        sent = [pool.submit(service.client.get, path) for _ in "ab"]
        try:
            until(lambda: any(answer.done() for answer in sent))
        finally:
            go.set()
    return sorted((answer.result() for answer in sent), key=lambda answer: answer.status_code)


def test_receipts_of_a_request_that_are_asked_for_at_once_are_counted(serving, monkeypatch):
    """Each answer holds them in memory until it is read."""
    monkeypatch.setattr("assay.poc.service.receipt_keeper.OWN_FILES", 1)
    with serving() as service:
        store(service, receipt("a"))
        receipts = service.controller.receipts
        go = threading.Event()
        of_request = receipts.of_request

        def read(*arguments):
            assert go.wait(20)
            return of_request(*arguments)

        monkeypatch.setattr(receipts, "of_request", read)
        answers = answers_at_once(service, f"{RECEIPTS}/a", go)
        assert [answer.status_code for answer in answers] == [200, 429]
        assert len(get(service, "/a")["receipts"]) == 1


def secret(number: int) -> str:
    return f"secret-{hashlib.sha256(str(number).encode()).hexdigest()}"


def test_a_deletion_leaves_nothing_behind_and_others_stay(serving):
    receiver = FlakyReceiver(trouble=1.0)
    receiver.close()  # callbacks stay undelivered
    with serving(receipt_callback_url=receiver.url, callback_attempts=1000) as service:
        made = [
            receipt(secret(i), user_seed=secret(1000 + i), output=tuple(range(1 + i % 90)))
            for i in range(300)
        ]
        for start in range(0, 300, 50):
            store(service, *made[start : start + 50])
        gone = {i for i in range(300) if i % 3 != 1}
        assert all(secret(i).encode() in on_disk(service) for i in gone)
        for i in sorted(gone, key=secret):
            assert service.client.delete(f"{RECEIPTS}/{secret(i)}").json() == {"deleted": 1}
        left = on_disk(service)
        assert not [
            i for i in gone if secret(i).encode() in left or secret(1000 + i).encode() in left
        ]
        (file,) = files(service)
        assert [each.request_id for each in file.receipts] == [
            secret(i) for i in range(300) if i not in gone
        ]


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
    postpone = "UPDATE outbox SET status = 'pending', next_attempt_at = ?"
    in_an_hour = time.time() + 3600.0
    with (
        FlakyReceiver(trouble=0.0) as receiver,
        serving(receipt_callback_url=receiver.url, callback_interval=1000.0) as service,
    ):
        outbox = service.controller.outbox
        store(service, *(receipt("chat", index=index) for index in range(3)))
        service.sql(postpone, (in_an_hour,))
        assert service.client.delete(f"{RECEIPTS}/chat", params={"index": 1}).json() == {
            "deleted": 1
        }
        assert [each["receipt"]["index"] for each in get(service, "/chat")["receipts"]] == [0, 2]
        assert outbox.counts() == {"pending": 1, "dead": 0}
        service.sql("UPDATE outbox SET next_attempt_at = 0")
        until(lambda: outbox.counts() == {"pending": 0, "dead": 0})
        [body] = receiver.taken.values()
        assert [each["index"] for each in body["receipts"]] == [0, 2]
        # As if it had not been delivered.
        service.sql(postpone, (in_an_hour,))
        assert outbox.counts() == {"pending": 1, "dead": 0}
        service.client.delete(f"{RECEIPTS}/chat")
        assert outbox.counts() == {"pending": 0, "dead": 0}
        assert service.sql("SELECT id FROM outbox") == []


def test_old_receipts_are_deleted_and_a_clock_that_jumps_deletes_nothing(service, monkeypatch):
    store(service, *(receipt(f"chat-{i}") for i in range(7)))
    keeper = service.controller.receipts
    day = 86_400.0
    service.sql("UPDATE receipts SET at = at - ? WHERE seq <= 5", (29 * day,))
    monkeypatch.setattr(_receipts, "DELETED_AT_ONCE", 3)
    assert keeper.prune(30 * day) == 0
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 400 * day)
        assert keeper.prune(30 * day) == 0
    assert [keeper.prune(28 * day) for _ in range(3)] == [3, 2, 0]
    assert [entry["request_id"] for entry in get(service, "")["receipts"]] == ["chat-5", "chat-6"]


def test_a_service_deletes_what_is_old_by_itself(serving, monkeypatch):
    deleted = []
    prune = ReceiptKeeper.prune

    def noted_prune(keeper: ReceiptKeeper, keep: float) -> int:
        deleted.append(prune(keeper, keep))
        return deleted[-1]

    monkeypatch.setattr(ReceiptKeeper, "prune", noted_prune)
    with serving() as service:
        store(service, receipt(secret(1)), receipt("young"))
        until(lambda: deleted)
        service.sql("UPDATE receipts SET at = at - ? WHERE seq = 1", (31 * 86_400.0,))
        service.restart()
        until(lambda: len(get(service, "")["receipts"]) == 1)
        until(lambda: secret(1).encode() not in on_disk(service))
        # After each the keeper looks for old receipts if it is due: at once where it deleted some.
        for i in range(3):
            store(service, receipt(f"late-{i}"))
        assert deleted == [0, 1, 0]
