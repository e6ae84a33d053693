"""The tables of the documentation, made from committed results.

Pages call these functions through cog: ``make docs`` writes the tables, and
``tests/docs/test_generated.py`` fails where a page and the results differ. Every function prints
one Markdown table.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from assay_research.approaches import weight_rows
from assay_research.clusters.clusters import HONEST
from assay_research.matrix import configurations, p_text
from assay_research.redteam.run import attack_table, fields, honest_errors, paying, paying_table
from assay_research.responses.run import standing_table
from assay_research.runs.runs import read_run

from assay.files.jsonl import read_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
RUNS = RESULTS / "experiments"
REDTEAM = ("qwen3", "llama")
RATIONAL = {"qwen3": "Qwen3", "llama": "Llama", "smollm2": "SmolLM2"}
FORMATS = {"bfloat16": "", "float16": "-float16", "float8": "-float8"}
RESPONSE_MODELS = ("qwen3", "llama", "trained-like")
_WORDS = {
    "d_h": "d_h",
    "d_s": "d_s",
    "e_small": "effect at 7 M",
    "e_large": "effect in the larger",
    "lost": "lost",
}


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print(f"| {' | '.join(header)} |")
    print(f"|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def hook_response_cells() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the cells of sign flips and of hooks with normalisation, per model on the GPU, narrow
    models first.
    """
    cells = [
        cell for run in ("h200", "h200-deep") for cell in read_run(RUNS / run, "approaches").cells
    ]
    by_approach = {(cell["model"], cell["approach"]): cell for cell in cells}
    models = sorted(
        {cell["model"]: cell["hidden_size"] for cell in cells}.items(), key=lambda item: item[1]
    )
    return [
        (by_approach[model, "poc-2.0"], by_approach[model, "layer-normalize"])
        for model, _ in models
    ]


def hooks() -> None:
    """Print how well int4 weights are told from honest ones with sign flips and with hooks."""
    header = (
        "model",
        "layers",
        "width",
        "sign flips: honest",
        "int4",
        "AUC",
        "hooks: honest",
        "int4",
        "AUC",
    )
    rows = []
    for pair in hook_response_cells():
        sides = [
            text
            for cell in pair
            for text in (
                f"{cell['honest_residual']:.5f}",
                f"{cell['int4_residual']:.4f}",
                "{:.3f} ({:.3f} to {:.3f})".format(cell["auc"], *cell["auc_interval"]),
            )
        ]
        rows.append(
            (f"`{pair[0]['model']}`", pair[0]["num_layers"], pair[0]["hidden_size"], *sides)
        )
    print_table(header, rows)


def weights(run: str) -> None:
    """Print the block means of trained and random weights."""
    header = (
        "model, weights",
        "alpha",
        "beta",
        "gamma",
        "spread of means",
        "noise band",
        "verdict",
        "context",
    )
    rows = [
        (
            f"{row['model'].partition(':')[2]}, {row['weights']}",
            *(f"{mean:.4f}" for mean in row["means"]),
            f"{row['spread']:.4f}",
            f"{row['low']:.4f} to {row['high']:.4f}",
            "inside" if row["inside"] else "beyond",
            f"{row['context_effect']:.2g}",
        )
        for row in weight_rows(read_run(RUNS / run, "weights").cells)
    ]
    print_table(header, rows)


def matrix_configurations(run: str) -> list[dict[str, Any]]:
    """Return the configurations of a matrix, with the effective dimensions that the approaches of
    its run measured.
    """
    measured = [
        cell for cell in read_run(RUNS / run, "approaches").cells if cell["approach"] == "poc-2.0"
    ]
    widths = {(cell["model"], "sign-flips"): cell["effective_dimension"] for cell in measured}
    return configurations(read_run(RUNS / run, "matrix").cells, widths)


def matrix(run: str) -> None:
    """Print the valid rate of every block in the live tests, in per cent."""
    header = ("model, mode", "alpha", "beta", "gamma", "spread", "noise band", "p", "nonces/s")
    rows = [
        (
            f"{configuration['model'].partition(':')[2]}, {configuration['mode']}",
            *(f"{100 * block['rate']:.1f}" for block in configuration["blocks"].values()),
            f"{100 * configuration['spread']:.1f}",
            "{:.1f} to {:.1f}".format(*(100 * end for end in configuration["noise_band"])),
            p_text(configuration["p_value"]),
            f"{configuration['nonces_per_second']:.0f}",
        )
        for configuration in matrix_configurations(run)
        if configuration["spread"] is not None
    ]
    print_table(header, rows)


def block_law() -> None:
    """Print how the widths of blocks vary, and how far they are from the chord law and from their
    own.
    """
    figures = read_json(RESULTS / "chord_law_blocks.json")
    rows = []
    for model, law in figures["over_blocks"].items():
        mine = [row for row in figures["poc-2.0"] if row["model"] == model]
        offsets = {
            name: np.std([row[name] for row in mine])
            for name in ("width_off_in_standard_errors", "width_off_the_block_in_standard_errors")
        }
        rows.append(
            (
                model.partition(":")[2],
                law["blocks"],
                f"{law['effective_dimension']:.0f}",
                f"{law['widths'][0]:.2f} to {law['widths'][1]:.2f}",
                f"{100 * law['sd_of_width']:.1f} % ({100 * law['sd_of_width_expected']:.1f} %)",
                *(f"{offset:.1f}" for offset in offsets.values()),
            )
        )
    header = (
        "model",
        "blocks",
        "effective dimension",
        "width over the chord law's",
        "its sd (expected)",
        "off the chord law",
        "off the law of the block",
    )
    print_table(header, rows)


def redteam_cells(name: str) -> list[Any]:
    """Return the cells of one committed red-team run."""
    return read_run(RUNS / f"redteam-{name}", "redteam").cells


def cheapest() -> None:
    """Print, per format and preset, the attack that saves a quarter of the work at the least
    error, both models side by side.
    """
    rows = []
    for suffix in FORMATS.values():
        of_models = [paying_table(redteam_cells(name + suffix)) for name in REDTEAM]
        for cells in zip(*(model_rows for _, model_rows in of_models), strict=True):
            columns = zip(*cells, strict=True)
            rows.append([" / ".join(dict.fromkeys(map(str, column))) for column in columns][1:])
    print_table(of_models[0][0][1:], rows)


def rational() -> None:
    """Print the largest share of cheap nonces that each strategy is paid, by law, in per cent."""
    largest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for run in read_json(RESULTS / "rational.json")["runs"]:
        for row in run["rows"]:
            key = (row["way"], row["law"].split(",")[0], row["multiples"])
            if key not in largest or row["paid_cheap"] > largest[key]["paid_cheap"]:
                largest[key] = row

    def cell(*key: str) -> str:
        row = largest[key]
        low, high = (100 * end for end in row["interval"])
        return f"{100 * row['paid_cheap']:.1f} ({low:.1f} to {high:.1f})"

    rows = []
    for name in dict.fromkeys(name for name, _, _ in largest):
        cells = [cell(name, model, "large") for model in RATIONAL]
        ends = [row["interval"][1] for key, row in largest.items() if key[::2] == (name, "small")]
        rows.append((name, *cells, f"{100 * max(ends):.0f}"))
    print_table(("strategy", *RATIONAL.values(), "at 1.5 to 3 times, at most"), rows)


def formats() -> None:
    """Print what the number format changes for ``hardened``, both models side by side."""
    columns = [_format_column(dtype, suffix) for dtype, suffix in FORMATS.items()]
    names = (
        "honest ε",
        "best attack that saves a quarter, over honest",
        "lightest experts left out (random / trained), over honest, first form",
        "int8 weights, over honest",
        "2 % junk within 300: `poc-2.0`",
    )
    print_table(("`hardened`, Qwen3 / Llama", *FORMATS), zip(names, *columns, strict=True))


def _format_column(dtype: str, suffix: str) -> list[str]:
    where = [
        (cells, *fields(cells)[0]) for cells in (redteam_cells(name + suffix) for name in REDTEAM)
    ]
    digits = 4 if dtype == "float16" else 3
    tables = [attack_table(*place, "hardened") for place in where]
    over = tables[0][0].index("over honest")
    claims = [
        row
        for cells, *_ in where
        for cell in cells
        if cell["kind"] == "claims"
        for row in cell["rows"]
    ]
    caught = [
        row["sequential"][-1]
        for row in claims
        if (row["claim"], row["preset"]) == ("2% invented", "poc-2.0")
    ]
    experts = read_json(RESULTS / f"hardened_experts{suffix.replace('-', '_')}.json")
    return [
        " / ".join(f"{honest_errors(*place)['hardened']:.{digits}f}" for place in where),
        " / ".join(f"{paying(*place, 'hardened')['over_honest']:.1f}" for place in where),
        " / ".join(f"{experts[name]['ratio']:.1f}" for name in ("random", "trained")),
        " / ".join(
            str(row[over]) for _, rows in tables for row in rows if row[0] == "int8 weights"
        ),
        " / ".join(f"{share:.4g}" for share in caught),
    ]


def _clusters() -> dict[str, Any]:
    return read_json(RESULTS / "clusters.json")


def _short(name: str) -> str:
    """Return the name of a build as the text calls it."""
    return name.replace("qwen3-235b-a22b-instruct-2507-fp8", "qwen3-235b").replace(
        "minimax-m2.7-awq-4bit", "AWQ"
    )


def _rows(sort: str) -> Iterable[tuple[str, dict[str, Any]]]:
    for build in _clusters()["builds"]:
        for row in build["rows"]:
            if row["sort"] == sort:
                yield _short(build["build"]), row


def honest_machines() -> None:
    """Print how often each rule accuses honest machines that are left out."""
    rows = [
        (
            name,
            row["rule"],
            row["audits"],
            f"{100 * row['accused']:.3f}",
            f"{100 * row['low']:.3f} to {100 * row['high']:.3f}",
            f"{100 * row['worst']:.2f}",
        )
        for name, row in _rows(HONEST)
        if "(0.75" not in row["rule"] and "(0.02" not in row["rule"]
    ]
    print_table(("build", "rule", "audits", "accused, %", "95 %", "worst pair, %"), rows)


def _response_cells() -> list[Any]:
    """Return the cells of the red team for responses, of all models."""
    return [
        cell
        for name in RESPONSE_MODELS
        for cell in read_run(RUNS / f"responses-{name}", "responses").cells
    ]


def int4_standing() -> None:
    """Print our figures for int4 weights beside those of the best rival."""
    print_table(*standing_table(_response_cells()))


def caught_cheats(figure: str, *methods: str, mode: str = "sampled") -> None:
    """Print the tokens until every cheat is caught, all models side by side; a dash where none was
    measured.

    Args:
        figure: Name of the figure, ``sequential_99`` or ``threshold_99``.
        methods: Names of the methods, one for each column.
        mode: Whether tokens are sampled or greedy.
    """
    cells = [cell for cell in _response_cells() if cell["kind"] == "cheat" and cell["mode"] == mode]
    methods_by_cheat = {
        (cell["model"].rpartition(":")[2], cell["name"]): cell["methods"] for cell in cells
    }
    rows = []
    for cheat in dict.fromkeys(name for _, name in methods_by_cheat):
        row = [cheat]
        for method in methods:
            values = [
                methods_by_cheat[model, cheat][method][figure]
                if (model, cheat) in methods_by_cheat
                else "–"
                for model in RESPONSE_MODELS
            ]
            row.append(" / ".join("never" if value is None else str(value) for value in values))
        rows.append(row)
    print_table(("cheat", *methods), rows)


def _interval(mean: Mapping[str, Any]) -> str:
    ends = "" if mean["low"] is None else f" ({mean['low']:.3f} to {mean['high']:.3f})"
    return f"{mean['value']:.3f}{ends}".replace("-", "−")


def claims_of_study3() -> None:
    """Print the five claims of the plan, their verdicts and the 99 % intervals."""
    rows = []
    for number, claim in enumerate(read_json(RESULTS / "vhack_study3.json")["claims"], 1):
        measured = ", ".join(
            f"{_WORDS[name]} {_interval(mean)}" for name, mean in claim["measured"].items()
        )
        rows.append((number, claim["says"], f"**{claim['verdict']}**", claim["why"], measured))
    print_table(("", "claim", "verdict", "rests on", "99 % intervals"), rows)
