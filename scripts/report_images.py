"""Takes the pictures of both instruments in docs/images: of the demo's report, and of published
training runs.

``python -m scripts.report_images`` writes them; it takes a minute or two.
"""

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from assay.cli import run
from assay.files.jsonl import read_json
from assay.pages.figures import SERIES, figure, legend
from assay.pages.report import Report
from tests.poc.service.dashboard.browser import Watched, chromium

IMAGES = Path(__file__).parents[1] / "docs" / "images"
RESULTS = Path(__file__).parents[1] / "research" / "results"
ARMS = {
    ("vhack_filter_seeds.json", "none"): "plain training",
    ("vhack_filter_seeds.json", "filter=cin-lda:random"): "as many dropped at random",
    ("vhack_filter_others.json", "penalty=cin-lda"): "flagged rollouts paid 1 less",
}
TOGETHER = 4  # steps whose mean is one point
FIGURE = (4.0, 3.2)  # inches
WIDTH = 440  # of pictures, which a phone of 360 shows at three quarters: letters stay legible
DOTS = 2  # of the file for one of its width
COLORS = 128  # of pages in flat colours: more are not seen, and make files three times as large
PARTS = {
    "report-poc": ("demo/report.html", "figure >> nth=0", "h2:has-text('v_hack')"),
    "vhack-filter": ("arms.html", "h2:has-text('Rollouts that cheat')", "p:has-text('End')"),
}
"""Report of each picture, and what stands where the picture begins and ends."""


def save_picture(taken: bytes, path: Path) -> None:
    """Write a screenshot as a PNG with a palette."""
    picture = Image.open(io.BytesIO(taken)).convert("RGB")
    picture.quantize(COLORS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def write_arms(path: Path) -> None:
    """Write a page with the share of rollouts that cheat over steps, by arm: mean and range of the
    seeds.
    """
    report = Report("v_hack", "")
    fig, ax = figure(*FIGURE)
    for ((file, name), label), color in zip(
        ARMS.items(), (SERIES[1], SERIES[3], SERIES[0]), strict=True
    ):
        seeds = read_json(RESULTS / file)["arms"][name]["seeds"]
        runs = [[step["hack"] for step in one["steps"]] for one in seeds.values()]
        points = (
            min(map(len, runs)) // TOGETHER
        )  # runs had equal time, and the slowest has the fewest steps
        means = (
            np.array([one[: points * TOGETHER] for one in runs])
            .reshape(len(runs), points, TOGETHER)
            .mean(axis=2)
        )
        steps = np.arange(points) * TOGETHER + (TOGETHER - 1) / 2
        ax.plot(steps, means.mean(axis=0), color=color, label=label, linewidth=1.8)
        ax.fill_between(
            steps, means.min(axis=0), means.max(axis=0), color=color, alpha=0.15, linewidth=0
        )
    ax.set(xlabel="step of training", ylabel="share of rollouts", ylim=(-0.03, 1.03))
    legend(ax, loc="upper center", bbox_to_anchor=(0.45, -0.22))
    report.section("Rollouts that cheat")
    report.figure(
        fig,
        "One exploit is stored in every group; the detector knows three of six kinds. A model of "
        "7 M, 8 seeds, equal time: an arm with slower steps ends earlier.",
    )
    report.paragraph("End")
    report.write(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as directory, chromium() as browser:
        folder = Path(directory)
        if run(["demo", "-o", str(folder / "demo")]):
            raise SystemExit("the demo did not end as the picture should show it")
        write_arms(folder / "arms.html")
        for name, (report, first, end) in PARTS.items():
            for scheme in ("light", "dark"):
                watched = Watched(
                    browser,
                    color_scheme=scheme,
                    viewport={"width": WIDTH, "height": 900},
                    device_scale_factor=DOTS,
                )
                watched.page.goto((folder / report).as_uri())
                top, bottom = (
                    watched.page.locator(place).first.bounding_box()["y"] for place in (first, end)
                )
                clip = {"x": 0, "y": top - 10, "width": WIDTH, "height": bottom - top - 10}
                path = out / f"{name}{'-dark' if scheme == 'dark' else ''}.png"
                save_picture(watched.page.screenshot(clip=clip, full_page=True), path)
                print(path, watched.errors)


if __name__ == "__main__":
    main()
