"""The tables of float8 in the documentation, made as those of :mod:`tables` are."""

from typing import Any

from tables import FORMATS, REDTEAM, RESULTS, print_table, redteam_cells

from assay.reports import read_json
from assay.research.redteam import PRESETS, attack_table, fields

NOT_MEASURED = "Not measured yet."


def attacks(*names: str) -> None:
    """Print attacks on float8 by preset, both models side by side.

    Args:
        names: Attacks, in the order of the table.
    """
    if "float8" not in FORMATS:
        print(NOT_MEASURED)
        return
    rows = []
    for preset in PRESETS:
        found = []
        for model in REDTEAM:
            cells = redteam_cells(model + FORMATS["float8"])
            columns, attacks = attack_table(cells, *fields(cells)[0], preset)
            found.append({row[0]: dict(zip(columns, row, strict=True)) for row in attacks})
        for name in names:
            if name in found[0]:
                sides = [" / ".join(str(side[name][column]) for side in found)
                         for column in ("cost", "over honest", "AUC", "sequential")]  # fmt: skip
                rows.append((f"`{preset}`", name, *sides))
    print_table(("preset", "attack, Qwen3 / Llama", "cost", "over honest", "AUC", "checked"), rows)


def measured_cases() -> list[dict[str, Any]]:
    """Return what was measured in float8 between engines, by model and format; nothing before it was."""
    path = RESULTS / "float8_laws.json"
    return list(read_json(path)["cases"]) if path.is_file() else []


def engine_name(machine: str, engine: str) -> str:
    """Return how the text calls an engine of a machine."""
    return "CPU" if engine == "cpu" else f"{engine}, {machine}"


def noise() -> None:
    """Print the noise of distances against the first machine's own kernels, a column for each model and format."""
    cases = measured_cases()
    if not cases:
        print(NOT_MEASURED)
        return
    columns = []
    for case in cases:
        column = {}
        for row in case["noise"]:
            one, other = row["between"]
            name = engine_name(*other)
            name = f"{engine_name(*one)} against {name}" if one[1] == other[1] == "eager kernels" else name
            column[name] = f"{1e4 * row['sd']:.1f}e-4 ({row['equal']:.0%})" if row["sd"] else "0"
        columns.append(column)
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(column.get(name, "–") for column in columns)) for name in names]
    print_table(("", *(case_name(case) for case in cases)), rows)


def case_name(case: dict[str, Any]) -> str:
    """Return how the text calls a model in a format."""
    return f"{case['model'].rpartition(':')[2]}, `{case['format']}`"


def bits() -> None:
    """Print the hashes of one block's records by model, format, machine and engine, engines of one hash together."""
    cases = measured_cases()
    if not cases:
        print(NOT_MEASURED)
        return
    rows = []
    for case in cases:
        groups: dict[tuple[str, str], list[str]] = {}
        for row in case["bits"]:
            if not row["engine"].startswith("cheat: "):
                groups.setdefault((row["machine"], row["sha256"]), []).append(row["engine"])
        rows += [(case_name(case), machine, "; ".join(engines), f"`{sha256[:12]}`")
                 for (machine, sha256), engines in groups.items()]  # fmt: skip
    print_table(("model", "machine", "engines", "SHA-256 of a block's records"), rows)


def laws(*cheats: str) -> None:
    """Print what the law of every pair of engines says of honest audits and of cheats, where these were tried.

    Args:
        cheats: Names of the cheats, a column for each.
    """
    cases = measured_cases()
    if not cases:
        print(NOT_MEASURED)
        return
    rows = []
    for case in cases:
        for law in case["laws"]:
            if set(cheats).isdisjoint(law["cheats"]):
                continue
            low, high = law["interval"]
            rows.append((case_name(case), f"`{law['preset']}`", engine_name(*law["validator"]),
                         f"{law['accused']} of {law['audits']} ({low:.1%} to {high:.1%})",
                         *(_caught(law["cheats"].get(name)) for name in cheats)))  # fmt: skip
    print_table(("model", "preset", "validator", "honest audits accused", *cheats), rows)


def _caught(cheat: dict[str, Any] | None) -> str:
    if cheat is None:
        return "–"
    multiple = f" ({cheat['over_honest']:.1f} ×)" if cheat["over_honest"] else ""
    return f"{cheat['checked'] or 'never'}{multiple}"
