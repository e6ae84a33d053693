"""The tables of the documentation, made from committed results.

Pages call these functions through cog: ``make docs`` writes the tables, and ``tests/docs/test_generated.py`` fails
where a page and the results differ. Every function prints one Markdown table.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from assay_research.approaches.approaches import weight_rows
from assay_research.matrix.matrix import Configuration, configurations
from assay_research.redteam.run import attack_table, fields, honest_errors, paying, paying_table
from assay_research.runs.runs import read_run

from assay.files.jsonl import read_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
RUNS = RESULTS / "experiments"
REDTEAM = ("qwen3", "llama")
FORMATS = {"bfloat16": "", "float16": "-float16", "float8": "-float8"}


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print(f"| {' | '.join(header)} |")
    print(f"|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def hook_cells() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the cells of sign flips and of hooks with normalisation, per model on the GPU, narrow models first."""
    cells = [cell for run in ("h200", "h200-deep") for cell in read_run(RUNS / run, "approaches").cells]
    found = {(cell["model"], cell["approach"]): cell for cell in cells}
    models = sorted({cell["model"]: cell["hidden_size"] for cell in cells}.items(), key=lambda item: item[1])
    return [(found[model, "poc-2.0"], found[model, "layer-normalize"]) for model, _ in models]


def hooks() -> None:
    """Print how well int4 weights are told from honest ones with sign flips and with hooks."""
    header = ("model", "layers", "width", "sign flips: honest", "int4", "AUC", "hooks: honest", "int4", "AUC")
    rows = []
    for pair in hook_cells():
        sides = [
            text
            for cell in pair
            for text in (
                f"{cell['honest_residual']:.5f}",
                f"{cell['int4_residual']:.4f}",
                "{:.3f} ({:.3f} to {:.3f})".format(cell["auc"], *cell["auc_interval"]),
            )
        ]
        rows.append((f"`{pair[0]['model']}`", pair[0]["num_layers"], pair[0]["hidden_size"], *sides))
    print_table(header, rows)


def weights(run: str) -> None:
    """Print the block means of trained and random weights."""
    header = ("model, weights", "alpha", "beta", "gamma", "spread of means", "noise band", "verdict", "context")
    rows = [
        (
            f"{row.model.partition(':')[2]}, {row.weights}",
            *(f"{mean:.4f}" for mean in row.means),
            f"{row.spread:.4f}",
            f"{row.low:.4f} to {row.high:.4f}",
            "inside" if row.inside else "beyond",
            f"{row.context_effect:.2g}",
        )
        for row in weight_rows(read_run(RUNS / run, "weights").cells)
    ]
    print_table(header, rows)


def matrix_configurations(run: str) -> list[Configuration]:
    """Return the configurations of a matrix, with the effective dimensions that the approaches of its run measured."""
    measured = [cell for cell in read_run(RUNS / run, "approaches").cells if cell["approach"] == "poc-2.0"]
    widths = {(cell["model"], "sign-flips"): cell["effective_dimension"] for cell in measured}
    return configurations(read_run(RUNS / run, "matrix").cells, widths)


def matrix(run: str) -> None:
    """Print the valid rate of every block in the live tests, in per cent."""
    header = ("model, mode", "alpha", "beta", "gamma", "spread", "noise band", "p", "nonces/s")
    rows = []
    for found in matrix_configurations(run):
        spread = found.spread
        if spread is not None:
            rows.append((
                f"{found.model.partition(':')[2]}, {found.mode}",
                *(f"{100 * block.rate:.1f}" for block in found.blocks),
                f"{100 * spread.value:.1f}",
                f"{100 * spread.low:.1f} to {100 * spread.high:.1f}",
                spread.p_text,
                f"{found.nonces_per_second:.0f}",
            ))  # fmt: skip
    print_table(header, rows)


def block_law() -> None:
    """Print how the widths of blocks vary, and how far they are from the chord law and from their own."""
    figures = read_json(RESULTS / "chord_law_blocks.json")
    rows = []
    for model, found in figures["over_blocks"].items():
        mine = [row for row in figures["poc-2.0"] if row["model"] == model]
        offsets = {name: np.std([row[name] for row in mine]) for name in (
            "width_off_in_standard_errors", "width_off_the_block_in_standard_errors")}  # fmt: skip
        rows.append((
            model.partition(":")[2],
            found["blocks"],
            f"{found['effective_dimension']:.0f}",
            f"{found['widths'][0]:.2f} to {found['widths'][1]:.2f}",
            f"{100 * found['sd_of_width']:.1f} % ({100 * found['sd_of_width_expected']:.1f} %)",
            *(f"{offset:.1f}" for offset in offsets.values()),
        ))  # fmt: skip
    header = ("model", "blocks", "effective dimension", "width over the chord law's", "its sd (expected)",
              "off the chord law", "off the law of the block")  # fmt: skip
    print_table(header, rows)


def redteam_cells(name: str) -> list[Any]:
    """Return the cells of one committed red-team run."""
    return read_run(RUNS / f"redteam-{name}", "redteam").cells


def cheapest() -> None:
    """Print, per model, format and preset, the attack that saves a quarter of the work at the least error."""
    tables = [paying_table(redteam_cells(name + suffix)) for suffix in FORMATS.values() for name in REDTEAM]
    print_table(tables[0][0], [row for _, rows in tables for row in rows])


def formats() -> None:
    """Print what the number format changes for ``hardened``, both models side by side."""
    columns = [_format_column(dtype, suffix) for dtype, suffix in FORMATS.items()]
    names = ("honest ε", "best attack that saves a quarter, over honest",
             "lightest experts left out (random / trained), over honest", "int8 weights, over honest",
             "2 % junk within 300: `poc-2.0`")  # fmt: skip
    print_table(("`hardened`, Qwen3 / Llama", *FORMATS), zip(names, *columns, strict=True))


def _format_column(dtype: str, suffix: str) -> list[str]:
    where = [(cells, *fields(cells)[0]) for cells in (redteam_cells(name + suffix) for name in REDTEAM)]
    digits = 4 if dtype == "float16" else 3
    tables = [attack_table(*place, "hardened") for place in where]
    over = tables[0][0].index("over honest")
    claims = [row for cells, *_ in where for cell in cells if cell["kind"] == "claims" for row in cell["rows"]]
    caught = [row["sequential"][-1] for row in claims if (row["claim"], row["preset"]) == ("2% invented", "poc-2.0")]
    experts = read_json(RESULTS / f"hardened_experts{suffix.replace('-', '_')}.json")
    return [
        " / ".join(f"{honest_errors(*place)['hardened']:.{digits}f}" for place in where),
        " / ".join(f"{paying(*place, 'hardened')['over_honest']:.1f}" for place in where),
        " / ".join(f"{experts[name]['ratio']:.1f}" for name in ("random", "trained")),
        " / ".join(str(row[over]) for _, rows in tables for row in rows if row[0] == "int8 weights"),
        " / ".join(f"{share:.4g}" for share in caught),
    ]


def simulated_lives() -> None:
    """Print what the account of a whole life convicts: honest nodes of unseen machines, and when cheaters go."""
    kinds = {"10% of the nonces cheap": "10 % at 22 ×", "20% of the nonces cheap": "20 % at 10 ×",
             "int4 weights, late": "late", "1.0% junk": "1 % junk"}  # fmt: skip
    header = ("law", "format", "preset", "honest nodes convicted", "share, 95 % interval",
              *(f"{name}: paid, round of 99 %" for name in kinds.values()))  # fmt: skip
    printed = []
    for cell in read_run(RUNS / "simulate-life", "simulate").cells:
        rows = {row["kind"]: row for row in cell["rows"] if row["rule"] == "lifetime"}
        low, high = rows["honest"]["convicted_interval"]
        convicted = f"{rows['honest']['convicted']} of {rows['honest']['nodes']}"
        paid = [f"{rows[kind]['paid']:.1%}, {rows[kind]['rounds_99'] or 'never'}" for kind in kinds]
        share = f"{low:.5f} to {high:.5f}"
        printed.append((cell["law"], cell["dtype"], f"`{cell['preset']}`", convicted, share, *paid))
    print_table(header, printed)


def cheap_shares() -> None:
    """Print honest audits accused, and shares of nonces that are computed cheaply and caught, beside an oracle."""
    measured: list[dict[str, Any]] = read_json(RESULTS / "shares.json")["rows"]
    cheats = [(cheat["share"], cheat["multiple"]) for cheat in measured[0]["cheats"][:4]]
    rows = []
    for name, model in (("Qwen3", "reference:qwen3"), ("Llama", "reference:llama")):
        for preset in ("poc-2.0", "artifact", "hardened"):
            for dtype in ("bfloat16", "float16"):
                found = [
                    row for row in measured if (row["model"], row["preset"], row["dtype"]) == (model, preset, dtype)
                ]
                accused = 100 * max(row["accused"] for row in found)
                worst = 100 * max(row["accused_worst_pair"] for row in found)
                caught = [
                    f"{min(row['cheats'][i]['caught'] for row in found):.3f} / {found[0]['cheats'][i]['oracle']:.3f}"
                    for i in range(len(cheats))
                ]
                rows.append((f"{name}, `{preset}`, {dtype}", f"{accused:.2f}", f"{worst:.1f}", *caught))
    header = [f"{share:.0%} at {multiple:g} ×" for share, multiple in cheats]
    print_table(("model, preset, format", "accused", "worst pair of blocks", *header), rows)
