"""Takes the pictures of both instruments' reports in docs/images, from real runs on the bundled model.

``python -m scripts.report_images`` writes them; it takes a minute or two.
"""

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image

from assay.cli import run
from tests.poc.service.dashboard.browser import Watched, chromium

IMAGES = Path(__file__).parents[1] / "docs" / "images"
CHECK = ("vhack", "check", "--model", "reference:qwen3", "--pairs", "generated:48")
WIDTH = 720
COLORS = 128  # of pages in flat colours: more are not seen, and make files three times as large
PARTS = {
    "report-poc": ("demo/report.html", "h2:has-text('How far off')", "h2:has-text('v_hack')"),
    "report-vhack": ("check.html", "h2:has-text('cin of held-out samples')", "dl >> nth=0"),
}
"""Report of each picture, and what stands where the picture begins and ends."""


def save_picture(taken: bytes, path: Path) -> None:
    """Write a screenshot as a PNG with a palette."""
    picture = Image.open(io.BytesIO(taken)).convert("RGB")
    picture.quantize(COLORS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as directory, chromium() as browser:
        folder = Path(directory)
        if run(["demo", "-o", str(folder / "demo")]) or run([*CHECK, "--html", str(folder / "check.html")]):
            raise SystemExit("a run did not end as the pictures should show it")
        for name, (report, first, end) in PARTS.items():
            for scheme in ("light", "dark"):
                watched = Watched(browser, color_scheme=scheme, viewport={"width": WIDTH, "height": 900})
                watched.page.goto((folder / report).as_uri())
                top, bottom = (watched.page.locator(place).first.bounding_box()["y"] for place in (first, end))
                clip = {"x": 0, "y": top - 10, "width": WIDTH, "height": bottom - top - 10}
                path = out / f"{name}{'-dark' if scheme == 'dark' else ''}.png"
                save_picture(watched.page.screenshot(clip=clip, full_page=True), path)
                print(path, watched.errors)


if __name__ == "__main__":
    main()
