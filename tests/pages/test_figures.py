import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import pytest

from assay.pages.figures import INK, MUTED, PAPER, RULE, SERIES, figure, legend, to_svg


def test_a_figure_is_well_formed_described_and_refers_to_nothing_outside():
    fig, ax = figure()
    for colour in SERIES[:2]:
        ax.plot([0, 1], [0.2, 0.3], label="band", color=colour)
    legend(ax)
    ax.set_xlabel("distance")
    svg = to_svg(fig, prefix="f1", description='a "quoted" <plot> \\1')
    assert not any(colour in svg for colour in (*SERIES, INK, MUTED, RULE, PAPER))
    assert "var(--c1)" in svg
    assert "var(--ink)" in svg
    for forbidden in ("<metadata", "<?xml", "DOCTYPE", "matplotlib.org", "DejaVu", "<image"):
        assert forbidden not in svg
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == 'a "quoted" <plot> \\1'
    assert root.get("width") is None
    assert [float(x) for x in root.get("viewBox").split()][:2] == [0, 0]
    ids = {element.get("id") for element in root.iter()}
    attributes = [pair for element in root.iter() for pair in element.attrib.items()]
    links = {target.removeprefix("#") for name, target in attributes if name.endswith("href")}
    assert links
    assert links <= ids


def test_the_settings_of_a_user_change_no_figure():
    """A matplotlibrc that asks for LaTeX is read at the import, from the working directory too."""

    def drawn():
        fig, ax = figure()
        ax.semilogy([0.1, 10], color=SERIES[0], linewidth=1, label="a_b")
        legend(ax)
        return to_svg(fig, prefix="f", description="d")

    usual = drawn()
    with matplotlib.rc_context({"text.usetex": True, "font.size": 20, "svg.fonttype": "path"}):
        assert drawn() == usual
        assert matplotlib.rcParams["text.usetex"]


@pytest.mark.slow
def test_pyplot_is_never_loaded():
    code = (
        "import sys; from assay.pages.figures import figure, to_svg;"
        "to_svg(figure()[0], prefix='f', description='d'); print('matplotlib.pyplot' in "
        "sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout == "False\n"
