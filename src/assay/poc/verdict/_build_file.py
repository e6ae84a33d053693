"""The noise of a build as values of a calibration file, and back."""

import math
from dataclasses import asdict
from typing import Any

from assay import stats
from assay.poc.protocol import parse_fingerprint
from assay.poc.verdict._build_noise import LAWS, MIN_NONCES, BuildNoise, Machine, machines_of
from assay.poc.verdict._machines import LeftOut, MachineNoise, Sizes
from assay.poc.verdict._noise import law_as_dict, law_from_dict, named_from_dict, spread_from_dict
from assay.reports import JsonObject

_MOST_MACHINES = 4096
_LONGEST_NAME = 4096  # a kind of machine is its device and its number format
_SIZES = (1e-30, 1e3)  # far beyond what residuals of unit vectors can have, relative to a block or not


def build_as_dict(build: BuildNoise) -> JsonObject:
    """Return JSON-ready values."""
    noise = build.noise
    machines = [
        {"name": one.name, "kind": one.kind, "fingerprint": one.fingerprint.as_dict() if one.fingerprint else None}
        for one in build.machines
    ]
    told = {"mixture": True} if build.mixture else {}  # a file without it is one of before
    return told | {
        "output": build.output,
        "preset": build.preset,
        "digest": build.digest,
        "n": build.n,
        "hidden_size": build.hidden_size,
        "effect": build.effect,
        "machines": machines,
        "law": law_as_dict(noise.law),
        "sizes": [[i, j, size] for (i, j), size in noise.sizes.pairs.items()],
        "spread": asdict(noise.spread),
        "known": asdict(noise.known),
        "left_out": asdict(build.left_out) if build.left_out else None,
        "named": {name: law_as_dict(law) for name, law in build.named.items()},
    }


def build_from_dict(values: Any) -> BuildNoise:
    """Read what :func:`build_as_dict` wrote.

    Raises:
        ValueError: A value cannot come from a measurement. TypeError, KeyError and AttributeError mean the same.
    """
    values = dict(values)
    machines = tuple(_machine(one) for one in values.pop("machines"))
    law = law_from_dict(values.pop("law"))
    spread, known = spread_from_dict(values.pop("spread")), spread_from_dict(values.pop("known"))
    pairs = {(i, j): _size(size) for i, j, size in values.pop("sizes")}
    indices = range(len(machines))
    listed = all(i in indices and j in indices and i < j for i, j in pairs)
    if not (2 <= len(machines) <= _MOST_MACHINES and pairs and listed):
        raise ValueError("sizes of other machines than are listed")
    sizes = Sizes(pairs, tuple(machine.kind for machine in machines))
    left_out, named = values.pop("left_out"), values.pop("named")
    build = BuildNoise(
        **values,
        machines=machines,
        noise=MachineNoise(law, sizes, spread, known),
        left_out=LeftOut(**{name: _number(value) for name, value in left_out.items()}) if left_out else None,
        named=named_from_dict(named),
    )
    _check(build)
    return build


def _check(build: BuildNoise) -> None:
    """Refuse values that no measurement gives.

    Raises:
        ValueError: Says which.
    """
    if any(not isinstance(value, str | None) for value in (build.digest, build.preset)):
        raise ValueError(f"digest {build.digest!r:.60}, preset {build.preset!r:.60}")
    if any(type(law) is not LAWS.get(build.output) for law in (build.noise.law, *build.named.values())):
        raise ValueError(f"a {type(build.noise.law).__name__} for output {build.output!r:.60}")
    if type(build.n) is not int or build.n < MIN_NONCES:
        raise ValueError(f"{build.n!r:.60} nonces, fewer than {MIN_NONCES}")
    if type(build.hidden_size) is not int or not 0 <= build.hidden_size <= 2**20:
        raise ValueError(f"hidden size {build.hidden_size!r:.60}")
    if build.mixture not in (None, True):
        raise ValueError(f"mixture {build.mixture!r:.60}")
    if build.effect is not None and not 1 < _number(build.effect) < 100:
        raise ValueError(f"effect {build.effect!r:.60}")


def first_version(values: JsonObject) -> BuildNoise:
    """Return the noise of a file of schema 1, whose law was an upper one."""
    values = dict(values)
    one, other = parse_fingerprint(values["prover"]), parse_fingerprint(values["validator"])
    law = law_from_dict(values["law"])
    machines = machines_of([one, other])
    sizes = Sizes({(0, 1): law.size}, tuple(machine.kind for machine in machines))
    build = BuildNoise(
        output=values["output"],
        preset=values.get("preset"),
        digest=values.get("digest"),
        machines=machines,
        noise=MachineNoise(law, sizes, stats.Spread(), stats.Spread()),
        n=values["n"],
    )
    _check(build)
    return build


def _machine(values: Any) -> Machine:
    stated = values["fingerprint"]
    return Machine(
        name=_text(values["name"], 1),
        kind=_text(values["kind"], 0),
        fingerprint=None if stated is None else parse_fingerprint(stated),
    )


def _text(value: Any, fewest: int) -> str:
    if not isinstance(value, str) or not fewest <= len(value) <= _LONGEST_NAME or not value.isprintable():
        raise ValueError(f"a name {value!r:.60}")
    return value


def _size(value: Any) -> float:
    low, high = _SIZES
    if not low <= _number(value) <= high:
        raise ValueError(f"a size of {value!r:.60}")
    return float(value)


def _number(value: Any) -> Any:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.60} where a finite number belongs")
    return value
