import re
from html.parser import HTMLParser

import pytest

from assay.errors import StorageError
from assay.pages.figures import figure
from assay.pages.report import Badge, Report
from tests.poc.service.dashboard import browser as chromium

browser = chromium.browser
watch = chromium.watch  # fixtures
ORIGIN = {"versions": {"python": "3.11"}, "commit": "abc", "dirty": True, "gpu": None}
VOID = {"meta", "br", "hr", "img"}


class Checker(HTMLParser):
    """Collects text and ids, and refuses tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.ids = []
        self.text = []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def sample():
    report = Report("A & B", "why <i>", command="assay demo", origin=ORIGIN)
    report.section("One <section>")
    report.paragraph("It said ", Badge("honest", "pass"), " & more.")
    report.table(
        ["name", "n", "rate"], [["a<b", 3, "59.0 %"], ["c", None, "−1.5 %"]], caption="Cap & tion"
    )
    report.definitions({"alpha": 1e-3, "done": True, "none": None})
    for _ in range(2):
        fig, ax = figure()
        ax.plot([0, 1])
        report.figure(fig, "A line & its caption")
    with report.details("More"):
        report.paragraph("a < b && c")
    return report


def test_a_page_is_well_formed_escaped_and_loads_nothing_from_outside():
    page = sample().render()
    checker = parse(page)
    assert len(checker.ids) == len(set(checker.ids)) > 10
    for raw in ("<i>", "<section>", "a<b", "a < b"):
        assert raw not in page
    text = "".join(checker.text)
    for shown in ("A & B", "why <i>", "One <section>", "a<b", "Cap & tion", "a < b && c"):
        assert shown in text
    for shown in ("assay demo", "abc with local changes", "python 3.11"):  # its origin
        assert shown in text
    assert "gpu" not in text
    addresses = set(re.findall(r"https?://[^\"' )]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)", page)


def test_write_is_complete_or_an_error(tmp_path):
    sample().write(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == sample().render()
    with pytest.raises(StorageError):
        sample().write(tmp_path / "none" / "r.html")


HOSTILE = (
    "<img src=x onerror='document.title=1'></svg></style><script>document.title=2</script>"
    "\u202etxt.`\u2066\x07&amp;"
)


@pytest.mark.browser
def test_whatever_a_page_is_told_stays_text_in_chromium(watch, tmp_path):
    report = Report(
        HOSTILE,
        HOSTILE,
        command=HOSTILE,
        origin={"versions": {HOSTILE: HOSTILE}, "commit": HOSTILE},
    )
    report.section(HOSTILE)
    report.paragraph(HOSTILE, Badge(HOSTILE, "pass"))
    report.table([HOSTILE, "n"], [[HOSTILE, HOSTILE]], caption=HOSTILE)
    report.definitions({HOSTILE: HOSTILE})
    fig, ax = figure()
    ax.plot([0, 1])
    report.figure(fig, HOSTILE)
    with report.details(HOSTILE):
        report.paragraph(HOSTILE)
    report.write(tmp_path / "page.html")
    watched = watch((tmp_path / "page.html").as_uri())
    text = watched.page.locator("body").inner_text()
    assert text.count("<img src=x") > 10
    assert not set("\u202e\u2066\x07") & set(text)
    assert watched.page.locator("img, script").count() == 0
    assert watched.page.title() not in ("1", "2")
    assert (watched.errors, len(watched.requests)) == ([], 1)
