"""The tables of float8 in the documentation, made as those of :mod:`tables` are."""

from typing import Any

from tables import RESULTS, print_table

from assay.files.jsonl import read_json

Engine = tuple[str, str]  # its name, and that of its machine


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
