"""The figures in the README's table are those of the result files beside them, rounded as they are shown."""

import re
from typing import Any

import pytest
from assay_research.redteam.tables import fields, paying
from assay_research.runs.runs import read_run

from assay.files.jsonl import read_json
from tests.docs.shell import ROOT

RESULTS = ROOT / "research" / "results"


def of(name: str) -> dict[str, Any]:
    return read_json(RESULTS / f"{name}.json")


def over_honest(run: str) -> str:
    cells = read_run(RESULTS / "experiments" / run, "redteam").cells
    (field,) = fields(cells)
    return f"{int(paying(cells, *field, 'hardened')['over_honest'])}"


def small() -> list[dict[str, Any]]:
    sets = [of(f"one_block_composite_{name}")["rows"] for name in ("cpu", "fresh")]
    return [row["candidates"]["none"] for rows in sets for row in rows if row["law_from"] == 256]


def audits() -> list[str]:
    blocks, average = (max(row["accused"] for row in rows) for rows in (of("shares")["rows"], small()))
    gpu = max(row["candidates"]["none"]["accused_worst_pair"] for row in of("one_nonce_h200")["rows"])
    cpu = max(row["accused_worst_pair"] for row in small())
    return [f"[{blocks:.2%}], [{gpu:.1%}] on an H200", f"[{average:.2%}], [{cpu:.1%}] on a CPU"]


def clusters() -> list[str]:
    rows = [row for build in of("clusters")["builds"] for row in build["rows"] if row["rule"] == "ours"]
    honest = [row for row in rows if row["sort"] == "honest"]
    (real,) = (row for row in rows if row["sort"] == "real" and row["cheat"].endswith("awq-4bit"))
    accused = sum(row["accused"] * row["audits"] for row in honest)
    count = f"{sum(row['audits'] for row in honest):,}".replace(",", " ")
    return [f"{accused:.0f} of {count}", f"after {real['median']} nonces", f"99 % after {real['most']}"]


def rates() -> list[str]:
    models = ("qwen3-0.6b", "llama-3.2-1b", "qwen3-4b", "llama-3.1-8b")
    ratios = [of(f"gpu_prove_{model}")["prove_over_compiled"] for model in models]
    inside = []
    for run in ("queued", "floor_llama-3.2-1b", "queued_llama-3.1-8b"):
        (row,) = of(f"vllm_direct_h200_{run}")["rows"]
        inside.append(f"{row['ratios']['own_over_transformers']:.2f}")
    return [f"`prove` [{min(ratios):.2f}] to [{max(ratios):.2f}] ×", "in vLLM [{}], [{}] and [{}] ×".format(*inside)]


def formats() -> list[str]:
    rows = [row for name in ("vllm_support_h200", "vllm_support_h200_v1") for row in of(name)["rows"]]
    judged = [preset for row in rows for preset in row["presets"].values()]
    caught = [found["cheat_on_vllm"] for found in judged].count("fraud")
    ways = [{found["vllm_on_transformers"], found["transformers_on_vllm"]} for found in judged]
    assert {found["nonces"] for found in rows} == {256}
    counts = [ways.count({verdict}) for verdict in ("honest", "undecided", "fraud")]
    return [f"[{caught} of {len(judged)}]", "honest [{}, undecided {}, fraud {}]".format(*counts)]


def directions() -> list[str]:
    models = of("vhack_checks_models")["models"].values()
    return [f"{found['generated']['lda, 5 axes']['checks']['pools']['value']:.3f}" for found in models]


def training() -> list[str]:
    name, parts = "adam/displaced-0.4+erase-update-two-sided/axes-whole", of("vhack_study3")["parts"]
    ends = []
    for arms, regime in (
        (of("vhack_study2")["arms"], ""),
        (parts["unsampled-30m"]["arms"], ""),
        (parts["unsampled-120m"]["arms"], ""),
        (parts["stored"]["arms"], "/stored-whole"),
        (parts["stored-30m"]["arms"], "/stored-whole"),
        (of("vhack_study3_first_organism")["parts"]["stored-120m"]["arms"], "/stored-whole"),
        (parts["stored-120m"]["arms"], "/stored-whole"),
    ):
        (arm,) = (arm for arm in arms if arm["condition"] == name + regime)
        ends.append(f"{arm['rates']['hack']['value']:.3f}")
    return [
        "[{}] at 7 M, [{} and {}] at 30 and 120 M; stored {} and {}".format(*ends[:5]),
        "at 120 M [{}] on one organism and {}, rising, on another".format(*ends[5:]),
    ]


ROWS = {
    "honest audits accused": audits,
    "the same, real clusters": clusters,
    "cheapest attack": lambda: [
        f"[{over_honest('redteam-qwen3-float16')}] and [{over_honest('redteam-llama-float16')}] ×",
        f"bfloat16 {over_honest('redteam-qwen3')} and {over_honest('redteam-llama')} ×",
    ],
    "nonces/s": rates,
    "quantised": formats,
    "hack directions": directions,
    "hack rate, held back": training,
}


def rows() -> list[str]:
    _, _, table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| measured |")
    return [row for row in table.splitlines() if row.startswith("| ")]


def test_every_row_is_checked():
    assert [next(name for name in ROWS if row.startswith(f"| {name}")) for row in rows()] == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_the_figures_of_a_row(name: str):
    (row,) = (row for row in rows() if row.startswith(f"| {name}"))
    said = re.sub(r"\]\([^)]*\)", "]", row).replace(" %", "%")
    for figure in ROWS[name]():
        assert figure.replace(" %", "%") in said, figure
