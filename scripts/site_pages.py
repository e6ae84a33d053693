"""Stage the pages of the site: ``python scripts/site_pages.py``; `make site` builds them after
that.

Pages are written for a reader of the repository. On the site the README is the front page, a link
to a file that is no page leads to the repository, a formula is MathML, and what makes a table is
left out. A link to nothing is an error. llms.txt lists the pages with their first sentences.
"""

import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "MIGRATION.md": "migration.md",
    "SECURITY.md": "security.md",
    "research/results/LEADERBOARD.md": "leaderboard.md",
    "docs/README.md": "pages.md",
}
"""Pages whose names on the site are not those that they have in docs."""

LINK = re.compile(r"""(\]\(|\b(?:src|srcset)=")([^)\s"]+)([)"])""")
MAKES_TABLE = re.compile(r"^<!-- \[\[\[.*?\]\]\] -->\n", re.MULTILINE)
FORMULA = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)


def pages() -> dict[Path, str]:
    """Return the pages, and the name of each on the site."""
    found = {
        path: path.relative_to(ROOT / "docs").as_posix()
        for path in sorted((ROOT / "docs").rglob("*.md"))
    }
    return found | {
        ROOT / path: name for path, name in ELSEWHERE.items() if (ROOT / path).is_file()
    }


def staged(page: Path, names: dict[Path, str], repository: str, missing: list[str]) -> str:
    """Return the text of a page for the site; links to nothing are added to ``missing``."""
    up = "../" * names[page].count("/")

    def linked(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        path, mark, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        there = (page.parent / path).resolve()
        if there in names:
            return f"{before}{up}{names[there]}{mark}{anchor}{after}"
        if there.is_relative_to(ROOT / "docs/images"):
            return f"{before}{up}{there.relative_to(ROOT / 'docs').as_posix()}{after}"
        if not there.exists():
            missing.append(f"{page.relative_to(ROOT)}: {target}")
            return match[0]
        kind = "tree" if there.is_dir() else "blob"
        path = there.relative_to(ROOT).as_posix()
        return f"{before}{repository}/{kind}/main/{path}{mark}{anchor}{after}"

    text = MAKES_TABLE.sub("", page.read_text(encoding="utf-8"))
    text = FORMULA.sub(lambda match: convert(match[1].strip(), display="block"), text)
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [LINK.sub(linked, part) for part in parts[::2]]
    return "".join(parts)


class _Loader(yaml.SafeLoader):
    """Reads the settings without making the objects that tags name."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def settings() -> dict[str, Any]:
    """Return the settings of the site."""
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)


def sections() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield every section of the site, with the name, title and first sentence of each of its
    pages.
    """
    paths = {name: path for path, name in pages().items()}
    for section in settings()["nav"]:
        for part, names in section.items():
            yield (
                part,
                [(name, *_opening(paths[name].read_text(encoding="utf-8"))) for name in names],
            )


def _opening(page: str) -> tuple[str, str]:
    heading, *rest = MAKES_TABLE.sub("", page).split("\n\n")
    prose = next((" ".join(part.split()) for part in rest if re.match(r"[\w*`]", part)), "")
    prose = re.sub(r"\*|\[(.*?)\]\(.*?\)", r"\1", prose)
    sentence = re.match(r".+?\.(?= [A-Z(`]| [\w-]+\.md|$)", prose)
    return heading.removeprefix("# ").strip(), sentence[0] if sentence else ""


def overview(name: str, description: str) -> Iterator[str]:
    """Yield the lines of llms.txt: every page by section, with its first sentence."""
    yield f"# {name}\n\n> {description}\n"
    for part, entries in sections():
        yield f"## {part}\n"
        for page, title, sentence in entries:
            address = page.removesuffix(".md").removesuffix("index")
            yield f"- [{title}]({address and f'{address}/'})" + (
                f": {sentence}" if sentence else ""
            )
        yield ""


def main() -> int:
    config = settings()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = ROOT / config["docs_dir"]
    shutil.rmtree(folder, ignore_errors=True)
    names = pages()
    missing = []
    for page, name in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(
            staged(page, names, project["urls"]["Repository"], missing), encoding="utf-8"
        )
    shutil.copytree(ROOT / "docs/images", folder / "images")
    shutil.copy(ROOT / "docs/site.css", folder)
    lines = overview(config["site_name"], config["site_description"])
    (folder / "llms.txt").write_text("\n".join(lines), encoding="utf-8")
    for link in missing:
        print(f"{link}: no such file", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
