"""Print the table of docs/vllm.md that says what vLLM runs, from the committed results."""

from collections.abc import Iterator
from typing import Any

from tables import RESULTS, print_table

from assay.files.jsonl import read_json
from assay.poc.verdict.calibrate import machine_kind

PRESETS = ("poc-2.0", "hardened")
ON_GPU = {"reference:qwen3": "vllm_gpu.json", "shape:qwen3-0.6b": "vllm_gpu_0.6b.json"}


def support() -> None:
    """Print what ran on real engines: version, runner, device, residual and verdicts, or the words of a refusal."""
    header = ("checkpoint", "dtype", "vLLM", "runner", "device", "nonces", "median residual", "a cheat's", "verdicts")
    rows = [_refused(row) if "refused" in row else _run(row) for row in _rows()]
    print_table(header, [*rows, *_on_gpu()])


def routers() -> None:
    """Print for how many positions other experts are asked, between engines and between formats on one engine."""
    header = (
        "mixture",
        "vLLM",
        "device",
        "positions",
        "vLLM again",
        "vLLM and transformers",
        "transformers in both formats",
    )
    rows = []
    for row in _rows():
        if "router" in row:
            router, device = row["router"], _built(row["fingerprint"])[2]
            compared = (router[name] for name in ("vllm_again", "vllm_from_transformers", "transformers_from_float32"))
            shares = (f"{100 * found['in_a_layer']:.2g} / {100 * found['in_any_layer']:.2g} %" for found in compared)
            rows.append((row["name"], row["vllm"], device, str(router["positions"]), *shares))
    print_table(header, rows)


def _rows() -> list[dict[str, Any]]:
    """Return the rows of every machine, those of a CPU first."""
    files = sorted(RESULTS.glob("vllm_support*.json"))
    return [row for file in files for row in read_json(file)["rows"]]


def parallel() -> None:
    """Print what ran on several devices: residuals, direct from requests, and the verdicts by the pinned law."""
    header = ("case", "device", "median residual", "a cheat's", "batches and requests", "verdicts")
    files = sorted(RESULTS.glob("vllm_parallel*.json"))
    cases = [case for file in files for case in read_json(file)["cases"] if "verdicts" not in case]
    print_table(header, [_case(case["name"], one) for case in cases for one in case.get("engines", [case])])


def _case(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    """Return the row of one engine; one that ended early has the reason, whatever it has shown before."""
    fingerprint = row.get("fingerprint")
    device = ", ".join(reversed(_built(fingerprint)[1:])) if fingerprint else ""
    for end in ("refused", "failed"):
        if end in row:
            errors = row.get("errors") or [""]
            return name, device, "", "", "", f"{end}: {row[end].splitlines()[0]} {errors[0]}".strip()
    presets = [row["presets"][preset] for preset in PRESETS]
    if "verdict_on_transformers" in presets[0]:
        (found,) = _medians([preset["residual_median"] for preset in presets])
        return name, device, "", found, "", f"the cheat: {_all([one['verdict_on_transformers'] for one in presets])}"
    honest = [one[way] for one in presets for way in ("vllm_direct_on_transformers", "transformers_on_vllm")]
    columns = ([one[f"{of}_median"] for one in presets] for of in ("residual", "cheat"))
    same = all(one["direct_from_requests_max"] == 0 for one in presets)
    largest = " / ".join(f"{one['direct_from_requests_max']:.1e}" for one in presets)
    reason = presets[0]["beside_the_scheduler"]["reason"]
    paths = f"requests only: {reason}" if reason else "same bits" if same else f"at most {largest}"
    return name, device, *_medians(*columns), paths, _said(honest, [one["cheat_on_vllm"] for one in presets])


def _run(row: dict[str, Any]) -> tuple[str, ...]:
    presets = [row["presets"][preset] for preset in PRESETS]
    honest = [found[way] for found in presets for way in ("vllm_on_transformers", "transformers_on_vllm")]
    false = [found["cheat_on_vllm"] for found in presets]
    residuals, cheats = ([found[name] for found in presets] for name in ("residual_median", "cheat_median"))
    shape = (*_built(row["fingerprint"]), str(row["nonces"]))
    return row["name"], row["asked"], *shape, *_medians(residuals, cheats), _said(honest, false)


def _refused(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        row["asked"],
        row["vllm"],
        "",
        "x86-64",
        "",
        "",
        "",
        f"refused: {row['refused'].splitlines()[0]}",
    )


def _on_gpu() -> Iterator[tuple[str, ...]]:
    """Yield the rows that were measured on an H200, in which the cheat has four bits."""
    for name, file in ON_GPU.items():
        figures = read_json(RESULTS / file)
        for case in figures["cases"]:
            presets = [case["presets"][preset] for preset in PRESETS]
            honest = [found["vllm_on_transformers"] for found in presets]
            both = [found["transformers_on_vllm"] for found in presets]
            false = [found["four_bits_on_vllm"] for found in presets]
            taken = {"honest", "undecided", "fraud"}
            said = _said([*honest, *both], false) if taken.issuperset(both) else f"{_all(honest)} on transformers"
            medians = ([found[f"residuals_{of}"][1] for found in presets] for of in ("same dtype", "four bits"))
            fingerprint = case["fingerprint"]
            shape = (fingerprint["dtype"], *_built(fingerprint), str(figures["compared"]))
            yield f"`{name}`, not quantised", *shape, *_medians(*medians), said


def _built(fingerprint: dict[str, Any]) -> tuple[str, str, str]:
    """Return version, runner and device of an engine."""
    library, runner, *_ = fingerprint["library"].split(", ")
    device = machine_kind(fingerprint["device"]).upper() or fingerprint["device"].replace("x86_64", "x86-64")
    return library.removeprefix("vllm "), runner.removeprefix("runner ").upper(), device


def _medians(*columns: list[float]) -> tuple[str, ...]:
    return tuple(" / ".join(f"{value:.1e}" for value in column) for column in columns)


def _said(honest: list[str], false: list[str]) -> str:
    return f"{_all(honest)} both ways; the cheat: {_all(false)}"


def _all(verdicts: list[str]) -> str:
    """Return a verdict that all share, or how many there are of each; of a refusal its first line."""
    verdicts = [verdict.splitlines()[0] for verdict in verdicts]
    kinds = sorted(set(verdicts))
    return kinds[0] if len(kinds) == 1 else ", ".join(f"{verdicts.count(kind)} {kind}" for kind in kinds)
