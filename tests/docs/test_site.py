"""The site is built without a warning, and a link to nothing is named."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.poc.service.dashboard.browser import chromium

ROOT = Path(__file__).parents[2]


SITE = ROOT / "build/site/html"

OFF_SCREEN = """() => {
  const cut = [...document.querySelectorAll("pre > code")]
    .filter(code => code.scrollWidth > code.clientWidth + 1)
    .map(code => code.innerText.slice(0, 60));
  const wide = [...document.querySelectorAll("article img, article svg")]
    .filter(picture => picture.getBoundingClientRect().right > window.innerWidth + 1)
    .map(picture => picture.outerHTML.slice(0, 60));
  const scrolls = document.documentElement.scrollWidth > window.innerWidth + 1;
  return [...cut, ...wide, ...(scrolls ? ["the page scrolls sideways"] : [])];
}"""
"""What a reader does not see on a screen of this width: code, pictures, a part of the page."""

TABLES_SCROLL = """() => [...document.querySelectorAll("article table")]
  .filter(table => table.scrollWidth > table.parentElement.clientWidth)
  .map(table => table.rows[0].innerText)"""
"""The heads of tables that are wider than the page."""


@pytest.fixture(scope="module")
def built():
    """The site, as `make site` builds it."""
    subprocess.run([sys.executable, "scripts/site_pages.py"], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("built")
def test_the_site_is_built_as_make_site_builds_it():
    assert (SITE / "statistics/index.html").is_file()


@pytest.mark.browser
@pytest.mark.needs("chromium")
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("built")
def test_no_code_and_no_picture_of_the_site_is_off_screen_on_any_width():
    faults = {}
    with chromium() as browser:
        page = browser.new_page()
        for path in sorted(SITE.rglob("index.html")):
            page.goto(path.as_uri())
            for width in (360, 768, 1280):
                page.set_viewport_size({"width": width, "height": 900})
                if off_screen := page.evaluate(OFF_SCREEN):
                    faults[width, path.parent.name] = off_screen
        page.set_viewport_size({"width": 360, "height": 900})
        page.goto((SITE / "index.html").as_uri())
        assert page.evaluate(TABLES_SCROLL) == [], "tables of the README fit on a phone"
    assert not faults


def test_a_link_to_nothing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import site_pages

    monkeypatch.setattr(site_pages, "ROOT", tmp_path)
    (tmp_path / "docs/images").mkdir(parents=True)
    (tmp_path / "docs/site.css").touch()
    (tmp_path / "docs/there.md").write_text("# There\n")
    (tmp_path / "docs/page.md").write_text(
        "# A page\n\nIt is [here](there.md#a), and [not](gone.md).\n\n```\n[x](y)\n```\n"
    )
    (tmp_path / "mkdocs.yml").write_text(
        "site_name: x\nsite_description: y\ndocs_dir: out\nnav:\n - A: [page.md]\n"
    )
    (tmp_path / "pyproject.toml").write_text('[project]\nurls.Repository = "https://example.org"\n')
    assert site_pages.main() == 1
    assert capsys.readouterr().err == "docs/page.md: gone.md: no such file\n"
    assert "[here](there.md#a)" in (tmp_path / "out/page.md").read_text()
