"""The page in Chromium, fed by a stand-in: what it shows, what it says when nothing comes, and whom
it obeys.
"""

import re

import pytest

from tests.poc.service.dashboard.stand_in import KEY, ROUND, StandIn, snapshot

pytestmark = pytest.mark.browser

LIVE = "document.body.dataset.link === 'live'"
VERDICT = {
    "time": 1_790_000_000.0,
    "public_key": "node_B",
    "block_hash": "block_alpha",
    "n": 48,
    "n_invalid": 0,
    "probability_honest": 1.0,
    "fraud_detected": False,
    "verdict": "honest",
}


@pytest.fixture
def live(watch, stand_in):
    """Open a page that shows a snapshot, in some window."""

    def run(first=None, **options):
        stand_in.send(first or snapshot())
        watched = watch(stand_in.url, **options)
        watched.wait(LIVE)
        return watched

    return run


def test_it_shows_the_figures_of_a_snapshot(live):
    watched = live()
    assert watched.text("state") == "Generating"
    assert watched.text("sentence") == "Computing nonces of this round."
    assert watched.text("rate") == "40.0"
    assert watched.number("checked") == 10_000
    assert watched.number("valid") == snapshot()["valid"]
    assert (watched.text("pending"), watched.text("dead")) == ("2", "pending, 0 dead")
    assert watched.text("share") == "node 1 of 3: 1, 4, …"
    assert (watched.text("block"), watched.text("key-of-round")) == ("block_alpha", "node_A")
    assert watched.text("uptime").replace("\u202f", " ") == "1 d 2 h"
    assert "reference:qwen3" in watched.text("model")
    assert "0.0 standard errors" in watched.text("rate-reading")
    assert watched.page.title() == "Generating 40.0/s · assay"
    assert watched.errors == []
    assert len(watched.origins) == 1


def test_a_hostile_block_hash_is_text(live):
    attack = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
    turned = "node\u202eA\u0007"
    verdict = VERDICT | {"public_key": attack, "block_hash": attack}
    watched = live(
        snapshot(
            round=ROUND | {"block_hash": attack, "public_key": turned},
            verdicts=[verdict],
            error=attack,
        )
    )
    assert watched.text("block") == attack
    assert watched.text("key-of-round") == r"node\u{202e}A\u{7}"
    assert attack in watched.text("sentence")
    assert watched.page.locator("#verdict-rows bdi").first.get_attribute("title") == attack
    assert watched.page.evaluate("window.broken") is None
    assert watched.page.locator("img, #main script, header script").count() == 0
    assert watched.errors == []


def test_an_open_fault_is_shown_with_its_places_and_never_as_honest_or_undecided(live):
    fault = {"verdict": "faulty", "fault": "position mod 16 in 0 to 1"}
    watched = live(snapshot(verdicts=[VERDICT | fault, VERDICT]))
    cells = watched.page.locator("#verdict-rows tr td:first-child").all_inner_texts()
    assert [cell.split()[:2] for cell in cells] == [["!", "faulty"], ["✓", "honest"]]
    assert "position mod 16 in 0 to 1" in cells[0]
    assert watched.errors == []


def test_a_snapshot_of_another_form_is_not_read(live, stand_in):
    watched = live()
    stand_in.send({"schema": "assay.poc.snapshot/2"})
    watched.wait_text("sentence", "load it again")
    assert watched.text("state") == "Generating"
    assert watched.errors == []


def test_a_fault_of_the_page_is_reported_and_does_not_end_the_connection(live, stand_in):
    watched = live()
    stand_in.send(snapshot(callbacks=None))
    stand_in.send(snapshot(checked=10_032))
    watched.wait("document.getElementById('checked').textContent === '10\u202f032'")
    assert len(watched.errors) == 1
    assert len(stand_in.asked) == 1


def test_silence_is_shown_and_so_is_the_end_of_it(watch, stand_in):
    watched = watch("about:blank")
    watched.page.clock.install()
    stand_in.send(snapshot())
    watched.page.goto(stand_in.url)
    watched.wait(LIVE)
    watched.page.clock.run_for(5_000)
    watched.wait("document.body.dataset.link === 'stale'")
    assert watched.text("link-text") == "Stale"
    assert "nothing comes" in watched.text("sentence")
    assert watched.page.title() == "Stale · assay"
    stand_in.send(snapshot(checked=10_032))
    watched.wait(LIVE)
    assert watched.number("checked") == 10_032
    assert watched.text("sentence") == "Computing nonces of this round."
    # A connection that stays silent is given up and made anew.
    before = len(stand_in.asked)
    watched.page.clock.run_for(13_000)
    watched.page.clock.run_for(2_000)
    watched.wait(LIVE)
    assert len(stand_in.asked) == before + 1


def test_a_closed_stream_and_an_unreadable_one_are_followed_by_another(live, stand_in):
    watched = live()
    watched.page.evaluate("""() => {
      window.said = [];
      const sentence = document.getElementById('sentence');
      new MutationObserver(() => said.push(sentence.textContent)).observe(sentence, { childList: true });
    }""")
    for last, reason in ((None, "the service closed the connection"), ("{", "could not be read")):
        stand_in.refuse = (503, {"detail": "the service is busy"}, {})
        stand_in.send(last)
        watched.wait_text("sentence", "the service is busy")
        assert any(reason in sentence for sentence in watched.page.evaluate("said"))
        assert watched.text("link-text") == "Disconnected"
        assert "What you see is" in watched.text("sentence")
        stand_in.next(snapshot())
        stand_in.refuse = None
        watched.wait(LIVE)
    assert watched.errors_besides("503") == []


def test_too_many_streams_are_waited_for_as_long_as_the_service_asks(watch, stand_in):
    stand_in.refuse = (429, {"detail": "32 event streams are open"}, {"Retry-After": "10"})
    stand_in.send(snapshot())
    watched = watch(stand_in.url)
    watched.wait_text("sentence", "32 event streams are open")
    assert watched.text("state") == "No connection"
    assert re.search(r"Next attempt in (10|9)\s", watched.text("sentence"))


def test_a_key_is_asked_for_kept_in_the_tab_and_forgotten(watch):
    stand_in = StandIn(key=KEY)
    stand_in.send(snapshot())
    try:
        watched = watch(stand_in.url)
        field = watched.page.get_by_label("API key")
        field.wait_for()
        assert watched.page.locator("#main").is_hidden()
        assert field.evaluate("(node) => node === document.activeElement")
        field.fill("another-key")
        field.press("Enter")
        watched.wait_text("key-reason", "refused: no valid API key")
        field.fill("clé")
        field.press("Enter")
        watched.wait_text("key-reason", "visible ASCII")
        field.fill(KEY)
        watched.page.get_by_role("button", name="Show the service").click()
        watched.wait(LIVE)
        assert watched.page.locator("#main").is_visible()
        assert watched.page.locator("#key-form").is_hidden()
        watched.page.reload()
        watched.wait(LIVE)
        assert stand_in.asked == ["", "Bearer another-key", f"Bearer {KEY}", f"Bearer {KEY}"]
        assert not any(KEY in url for url in watched.requests)
        watched.page.get_by_role("button", name="Forget the key").click()
        watched.page.get_by_label("API key").wait_for()
        assert watched.page.evaluate("sessionStorage.length") == 0
        assert watched.errors_besides("401") == []
    finally:
        stand_in.close()


@pytest.mark.parametrize(
    ("verdict", "count", "words"),
    [
        ("fraud", True, ["✕", "fraud"]),
        ("undecided", True, ["?", "undecided", "the count says fraud"]),
    ],
)
def test_the_count_is_told_in_words_beside_the_verdict(live, verdict, count, words):
    watched = live(snapshot(verdicts=[VERDICT | {"verdict": verdict, "fraud_detected": count}]))
    assert watched.page.locator("#verdict-rows td").first.inner_text().split("\n") == words
