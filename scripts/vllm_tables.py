"""Print the table of docs/vllm.md that says what vLLM runs, from the committed results."""

from collections.abc import Iterator
from typing import Any

from tables import RESULTS, print_table

from assay.reports import read_json

PRESETS = ("poc-2.0", "hardened")
ON_GPU = {"reference:qwen3": "vllm_gpu.json", "shape:qwen3-0.6b": "vllm_gpu_0.6b.json"}


def support() -> None:
    """Print what ran on real engines: version, runner, device, residual and verdicts, or the words of a refusal."""
    header = ("checkpoint", "dtype", "vLLM", "runner", "device", "median residual", "a cheat's", "verdicts")
    found = read_json(RESULTS / "vllm_support.json")["rows"]
    rows = [_refused(row) if "refused" in row else _run(row) for row in found]
    print_table(header, [*rows, *_on_gpu()])


def _run(row: dict[str, Any]) -> tuple[str, ...]:
    presets = [row["presets"][preset] for preset in PRESETS]
    honest = [found[way] for found in presets for way in ("vllm_on_transformers", "transformers_on_vllm")]
    false = [found["cheat_on_vllm"] for found in presets]
    residuals, cheats = ([found[name] for found in presets] for name in ("residual_median", "cheat_median"))
    return (row["name"], row["asked"], *_built(row["fingerprint"]), *_medians(residuals, cheats), _said(honest, false))


def _refused(row: dict[str, Any]) -> tuple[str, ...]:
    return row["name"], row["asked"], row["vllm"], "", "x86-64", "", "", f"refused: {row['refused'].splitlines()[0]}"


def _on_gpu() -> Iterator[tuple[str, ...]]:
    """Yield the rows that were measured on an H200, in which the cheat has four bits."""
    for name, file in ON_GPU.items():
        for case in read_json(RESULTS / file)["cases"]:
            presets = [case["presets"][preset] for preset in PRESETS]
            honest = [found["vllm_on_transformers"] for found in presets]
            both = [found["transformers_on_vllm"] for found in presets]
            false = [found["four_bits_on_vllm"] for found in presets]
            taken = {"honest", "undecided", "fraud"}
            said = _said([*honest, *both], false) if taken.issuperset(both) else f"{_all(honest)} on transformers"
            medians = ([found[f"residuals_{of}"][1] for found in presets] for of in ("same dtype", "four bits"))
            fingerprint = case["fingerprint"]
            yield f"`{name}`, not quantised", fingerprint["dtype"], *_built(fingerprint), *_medians(*medians), said


def _built(fingerprint: dict[str, Any]) -> tuple[str, str, str]:
    """Return version, runner and device of an engine."""
    library, runner, *_ = fingerprint["library"].split(", ")
    device = fingerprint["device"].removeprefix("NVIDIA ").replace("x86_64", "x86-64")
    return library.removeprefix("vllm "), runner.removeprefix("runner ").upper(), device


def _medians(*columns: list[float]) -> tuple[str, ...]:
    return tuple(" / ".join(f"{value:.1e}" for value in column) for column in columns)


def _said(honest: list[str], false: list[str]) -> str:
    return f"{_all(honest)} both ways; the cheat: {_all(false)}"


def _all(verdicts: list[str]) -> str:
    """Return a verdict that all share, or how many there are of each."""
    kinds = sorted(set(verdicts))
    return kinds[0] if len(kinds) == 1 else ", ".join(f"{verdicts.count(kind)} {kind}" for kind in kinds)
