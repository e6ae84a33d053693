"""The tables of float8 in the documentation, made as those of :mod:`tables` are."""

from typing import Any

from assay_research.redteam.field import PRESETS
from assay_research.redteam.tables import attack_table, fields
from tables import FORMATS, REDTEAM, RESULTS, print_table, redteam_cells

from assay.files.jsonl import read_json

Engine = tuple[str, str]  # its name, and that of its machine
FAR = 100  # times the honest noise, beyond which the figure says no more: that noise is a last bit now and then


def attacks(*names: str) -> None:
    """Print attacks on float8 by preset, both models side by side.

    Args:
        names: Attacks, in the order of the table.
    """
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
    """Return what was measured in float8 between engines, by model and format."""
    return list(read_json(RESULTS / "float8_laws.json")["cases"])


def engine_name(machine: str, engine: str) -> Engine:
    """Return how the text calls an engine, and its machine."""
    if machine == "CPU":
        return "another CPU", ""
    return "CPU" if engine == "cpu" else engine, machine.split()[0]


def case_name(case: dict[str, Any]) -> str:
    """Return how the text calls a model in a format."""
    return f"{case['model'].rpartition(':')[2]}, `{case['format']}`"


def noise() -> None:
    """Print the noise of distances against the first machine's own kernels, a column for each model and format."""
    cases = measured_cases()
    columns = []
    for case in cases:
        prover = case["noise"][0]["between"][0]
        columns.append({
            engine_name(*row["between"][1]): f"{1e4 * row['sd']:.1f}e-4" if row["sd"] else "0"
            for row in case["noise"]
            if row["between"][0] == prover
        })  # fmt: skip
    engines = dict.fromkeys(engine for column in columns for engine in column)
    rows = [(engine, [column.get(engine, "–") for column in columns]) for engine in engines]
    print_joined(("", *map(case_name, cases)), rows)


def bits() -> None:
    """Print the hashes of one block's records by model and format, engines of one hash together.

    Engines that proved fewer nonces of the block, which have another hash for that alone, are left out.
    """
    rows = []
    for case in measured_cases():
        nonces = max(row["nonces"] for row in case["bits"])
        rows += [(engine_name(row["machine"], row["engine"]), [case_name(case), f"`{row['sha256'][:12]}`"])
                 for row in case["bits"] if row["nonces"] == nonces]  # fmt: skip
    print_joined(("engines", "model", "SHA-256 of a block's records"), rows)


def laws(*cheats: str) -> None:
    """Print what the law of every pair of engines says of honest audits and of cheats, where these were tried.

    Args:
        cheats: Names of the cheats, a column for each.
    """
    rows = []
    for case in measured_cases():
        for law in case["laws"]:
            if set(cheats).isdisjoint(law["cheats"]):
                continue
            high = law["interval"][1]
            cells = [case_name(case), f"`{law['preset']}`", f"{law['accused']} of {law['audits']} (to {high:.1%})",
                     *(_caught(law["cheats"].get(name)) for name in cheats)]  # fmt: skip
            rows.append((engine_name(*law["validator"]), cells))
    print_joined(("validator", "model", "preset", "honest audits accused", *cheats), rows)


def _caught(cheat: dict[str, Any] | None) -> str:
    if cheat is None:
        return "–"
    over = cheat["over_honest"]
    multiple = "" if over is None or over > FAR else f" ({over:.1f} ×)"
    return f"{cheat['checked'] or 'never'}{multiple}"


def print_joined(header: tuple[str, ...], rows: list[tuple[Engine, list[str]]]) -> None:
    """Print a table of engines: those with equal cells share a row, and those of equal machines name these once."""
    joined: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for (engine, machine), cells in rows:
        joined.setdefault(tuple(cells), {}).setdefault(engine, []).append(machine)
    printed = []
    for cells, engines in joined.items():
        places: dict[str, list[str]] = {}
        for engine, machines in engines.items():
            places.setdefault(", ".join(filter(None, machines)), []).append(engine)
        names = ("; ".join(engines) + f" ({place})" * bool(place) for place, engines in places.items())
        printed.append(("; ".join(names), *cells))
    print_table(header, printed)
