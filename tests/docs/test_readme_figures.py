"""The figures in the README's table are those of the result files beside them, rounded as they are shown."""

import re
from typing import Any

import pytest

from assay.reports import read_json
from assay.research import redteam
from assay.research.runs import read_run
from tests.docs.shell import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def of(name: str) -> dict[str, Any]:
    return read_json(RESULTS / f"{name}.json")


def over_honest(run: str) -> str:
    cells = read_run(RESULTS / "experiments" / run, "redteam").cells
    (field,) = redteam.fields(cells)
    return f"{int(redteam.paying(cells, *field, 'hardened')['over_honest'])}"


def small() -> list[dict[str, Any]]:
    sets = [of(f"one_block_composite_{name}")["rows"] for name in ("cpu", "fresh")]
    return [row["candidates"]["none"] for rows in sets for row in rows if row["law_from"] == 256]


def audits() -> list[str]:
    blocks, average = (max(row["accused"] for row in rows) for rows in (of("shares")["rows"], small()))
    return [f"{blocks:.2%}] on an H200", f"{average:.2%}] on a CPU"]


def worst() -> list[str]:
    gpu = max(row["candidates"]["none"]["accused_worst_pair"] for row in of("one_nonce_h200")["rows"])
    cpu = max(row["accused_worst_pair"] for row in small())
    return [f"{gpu:.1%}] on an H200", f"{cpu:.1%}] on a CPU"]


def mixtures() -> list[str]:
    rows = [row for row in of("mixture_wider")["rows"] if row["law_from"] == 256]
    before, now = (max(row["accused"] for row in rows if row["rule"] == rule) for rule in ("today", "T"))
    return [f"{100 * before:.1f} and {now:.2%}]"]


def clusters() -> list[str]:
    rows = [row for build in of("clusters")["builds"] for row in build["rows"] if row["rule"] == "ours"]
    honest = [row for row in rows if row["sort"] == "honest"]
    (real,) = (row for row in rows if row["sort"] == "real" and row["cheat"].endswith("awq-4bit"))
    accused = sum(row["accused"] * row["audits"] for row in honest)
    count = f"{sum(row['audits'] for row in honest):,}".replace(",", " ")
    return [f"{accused:.0f} of {count}", f"after {real['median']} nonces", f"99 % after {real['most']}"]


def lives() -> list[str]:
    cells = read_run(RESULTS / "experiments" / "simulate-life", "simulate").cells
    honest = [row for cell in cells for row in cell["rows"] if row["kind"] == "honest"]
    (nodes,) = {row["nodes"] for row in honest}
    return [f"{nodes:,}".replace(",", " "), f"{max(row['convicted'] for row in honest) / nodes:.2%}"]


def prove() -> list[str]:
    models = ("qwen3-0.6b", "llama-3.2-1b", "qwen3-4b", "llama-3.1-8b")
    ratios = [of(f"gpu_prove_{model}")["prove_over_compiled"] for model in models]
    return [f"{min(ratios):.2f}] to [{max(ratios):.2f}] ×"]


def inside_vllm() -> list[str]:
    ratios = []
    for model in ("", "_llama-3.2-1b", "_llama-3.1-8b"):
        (row,) = of(f"vllm_direct_h200_queued{model}")["rows"]
        ratios.append(f"{row['ratios']['own_over_transformers']:.2f}")
    return ["[{}], [{}] and [{}] ×".format(*ratios)]


def formats() -> list[str]:
    rows = [row for name in ("vllm_support_h200", "vllm_support_h200_v1") for row in of(name)["rows"]]
    judged = [preset for row in rows for preset in row["presets"].values()]
    caught = [found["cheat_on_vllm"] for found in judged].count("fraud")
    ways = [{found["vllm_on_transformers"], found["transformers_on_vllm"]} for found in judged]
    assert {found["nonces"] for found in rows} == {256}
    counts = [ways.count({verdict}) for verdict in ("honest", "undecided", "fraud")]
    return [f"[{caught} of {len(judged)}]", "honest [{}, undecided {}, fraud {}]".format(*counts)]


def chat() -> list[str]:
    (cpu,), (gpu, all_time) = of("vllm_mixed")["shares"], of("vllm_mixed_h200")["shares"]
    assert all(row["identical"] == row["requests_beside_nonces"] for row in (cpu, gpu, all_time))
    ratios = [row["first_token_p50_ratio"] for row in (cpu, gpu, all_time)]
    return [f"{ratios[0]:.2f} ×]", "{:.2f} and {:.2f} ×".format(*ratios[1:])]


def directions() -> list[str]:
    models = of("vhack_checks_models")["models"].values()
    return [f"{found['generated']['lda, 5 axes']['checks']['pools']['value']:.3f}" for found in models]


def training() -> list[str]:
    name, found = "adam/displaced-0.4+erase-update-two-sided/axes-whole", []
    stored = of("vhack_study3")["parts"]["stored"]["arms"]
    for arms, end in ((of("vhack_study2")["arms"], ""), (stored, "/stored-whole")):
        (arm,) = (arm for arm in arms if arm["condition"] == name + end)
        rate = arm["rates"]["hack"]
        found += [f"{rate['n']} seeds", f"[{rate['value']:.3f}]"]
    return found


ROWS = {
    "honest audits accused": audits,
    "in the worst pair": worst,
    "of small mixtures": mixtures,
    "real clusters": clusters,
    "100 580 honest nodes": lives,
    "cheapest attack": lambda: [
        f"[{over_honest('redteam-qwen3-float16')}] and [{over_honest('redteam-llama-float16')}] ×",
        f"bfloat16 {over_honest('redteam-qwen3')} and {over_honest('redteam-llama')} ×",
    ],
    "`prove` over": prove,
    "inside vLLM": inside_vllm,
    "quantised": formats,
    "chat beside": chat,
    "hack directions": directions,
    "hack rate": training,
}


def rows() -> list[str]:
    _, _, table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What is measured")
    return [row for row in table.partition("\n## ")[0].splitlines() if row.startswith("| ")][1:]


def test_every_row_is_checked():
    assert [next(name for name in ROWS if row.startswith(f"| {name}")) for row in rows()] == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_the_figures_of_a_row(name: str):
    (row,) = (row for row in rows() if row.startswith(f"| {name}"))
    said = re.sub(r"\]\([^)]*\)", "]", row).replace(" %", "%")
    for figure in ROWS[name]():
        assert figure.replace(" %", "%") in said, figure
