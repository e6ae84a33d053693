"""``assay poc calibrate``: honest noise from proofs of machines, or from vectors that networks published."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.cli.output import progress_bar, show_values
from assay.errors import ProofMismatch, UsageError

if TYPE_CHECKING:
    from assay.cli.poc_settings import CalibrateSettings
    from assay.poc.protocol.blocks import BlockFactor
    from assay.poc.protocol.proof import Proof
    from assay.poc.verdict.calibrate import VectorSet
    from assay.poc.verdict.calibration import Calibration


# --------------------------------------------------------------------------------------------------
# ``assay poc calibrate --valid-rate``: the r_target of a wanted valid rate, in closed form and from proofs.

SCHEMA = "assay.poc.calibrate/1"


def show_target(chosen: "CalibrateSettings", proofs: "Sequence[Proof]", as_json: bool) -> None:
    """Print the closed form, and with proofs what they measure beside it.

    Raises:
        UsageError: A flag does not belong to this form, or a value is out of range.
        ProofMismatch: The proofs do not belong together, or are not of the model.
    """
    from assay import poc

    assert chosen.valid_rate is not None
    if chosen.output is not None or (chosen.model is not None and not proofs):
        seen = "--valid-rate with -o" if chosen.output is not None else "--valid-rate with --model and no proof"
        raise UsageError(seen, wanted="proofs of the model, and no file to write", do="leave the flag out")
    if chosen.model is not None and chosen.effective_dimension is not None:
        raise UsageError("--model with --effective-dimension", wanted="one of the two", do="leave one of them out")
    if not proofs:
        _show_closed_form(chosen, as_json)
        return
    found = poc.measure_r_target(
        proofs,
        chosen.valid_rate,
        dimension=chosen.dimension,
        effective_dimension=chosen.effective_dimension,
        factors=_factors(chosen, proofs),
    )
    show_values(SCHEMA, found.as_dict(), as_json)


def _show_closed_form(chosen: "CalibrateSettings", as_json: bool) -> None:
    """Print what holds over blocks and, with a random head, where 95 % of the blocks have their own rate."""
    from assay import stats
    from assay.stats.blocks import EFFECTIVE_DIMENSION
    from assay.stats.chord import RANDOM_HEAD_ROWS

    rate = chosen.valid_rate or 0.0
    size = RANDOM_HEAD_ROWS if chosen.dimension is None else chosen.dimension
    values: dict[str, object] = {"valid_rate": rate, "dimension": size, "r_target": stats.r_target_for(rate, size)}
    if size == RANDOM_HEAD_ROWS:
        given = chosen.effective_dimension
        law = stats.BlockLaw(dimension=size, freedom=EFFECTIVE_DIMENSION if given is None else given)
        low, high = law.rate_interval(stats.r_target_for(rate, size))
        values |= {
            "effective_dimension": law.freedom,
            "effective_dimension_from": "assumed" if given is None else "given",
            "block_rate_low": low,
            "block_rate_high": high,
        }
    show_values(SCHEMA, values, as_json)


def _factors(chosen: "CalibrateSettings", proofs: "Sequence[Proof]") -> "list[BlockFactor]":
    """Measure the factor of every proof's block with the model; none without --model."""
    if chosen.model is None:
        return []
    from assay import poc
    from assay.models.load import load_model

    model = load_model(chosen.model, device=chosen.device)
    other = [p.header for p in proofs if (p.header.digest, p.header.weights) != (model.digest, model.weights)]
    if other:
        raise ProofMismatch(
            f"a proof of checkpoint {other[0].digest[:12]} ({other[0].weights} weights)",
            wanted=f"proofs of {model.reference}, {model.digest[:12]} ({model.weights} weights)",
            do="pass their model with --model, or leave it out",
        )
    blocks = {proof.round.block_hash: proof.round for proof in proofs}
    measured = {block: poc.measure_block_factor(model, round) for block, round in blocks.items()}
    return [measured[proof.round.block_hash] for proof in proofs]


_OF_TARGETS = ("dimension", "device", "effective_dimension")
_OF_VECTORS = ("sets", "digest")
_OF_NOISE = ("vectors", *_OF_VECTORS, "against", "name", "merge")


def run_calibrate(chosen: "CalibrateSettings", paths: Sequence[Path], as_json: bool) -> None:
    """Give the r_target of a valid rate, or measure noise and write it to a file.

    Raises:
        UsageError: Flags do not belong together; the message names one.
        DataError: A file cannot be read, or is none of its kind.
        ProofMismatch: Proofs or sets do not belong together.
    """
    from assay import poc
    from assay.files.storage import check_new_file

    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UsageError(
            "a proof that is named twice",
            wanted="every file once: a machine says nothing about its noise beside itself",
            do="leave one out of PROOFS, or pass that of another machine",
        )
    if chosen.valid_rate is not None:
        _refuse(chosen, _OF_NOISE, "--valid-rate", "it measures no noise")
        show_target(chosen, [poc.Proof.load(path) for path in paths], as_json)
        return
    _refuse(chosen, _OF_TARGETS, "no --valid-rate", "it belongs to --valid-rate")
    merging = bool(chosen.merge) and not paths and chosen.vectors is None
    _check_sources(chosen, len(paths), merging)
    assert chosen.output is not None
    check_new_file(chosen.output, overwrite=True)
    if chosen.vectors is not None:
        measured = _of_vectors(chosen, chosen.vectors)
    elif merging:
        measured = poc.Calibration.load(chosen.merge[0])
    else:
        measured = _of_proofs(chosen, [poc.Proof.load(path) for path in paths])
    for path in chosen.merge[1:] if merging else chosen.merge:
        measured = measured.merged(poc.Calibration.load(path))
    measured.save(chosen.output)
    _show(measured, chosen.output, as_json)


def _check_sources(chosen: "CalibrateSettings", proofs: int, merging: bool) -> None:
    """Refuse what is no form of the command, before anything is read."""
    if chosen.vectors is None:
        _refuse(chosen, _OF_VECTORS, "no --vectors", "it belongs to --vectors")
    else:
        if proofs:
            raise UsageError("--vectors with proofs", wanted="one of the two", do="leave --vectors or the proofs out")
        _refuse(chosen, ("model",), "--vectors", "vectors have no block scale")
    if merging:
        _refuse(chosen, ("against", "name", "model"), "--merge alone", "nothing is measured")
        if len(chosen.merge) < 2:
            raise UsageError(
                "one file to merge", wanted="two or more, or proofs to measure", do="repeat --merge with another file"
            )
    elif chosen.vectors is None and proofs < 2:
        raise UsageError(
            f"neither --valid-rate, --vectors nor --merge, and {proofs} proof(s)",
            wanted="two honest proofs or more with -o, or another form of the command",
            do="`assay poc calibrate A.jsonl B.jsonl -o calibration.json`, or see `assay poc calibrate --help`",
        )
    if chosen.output is None:
        raise UsageError("a measurement without -o", wanted="a file to write it to", do="add -o calibration.json")
    names = chosen.name
    if len(names) != len(chosen.against) or len(set(names)) < len(names):
        raise UsageError(
            f"{len(chosen.against)} --against and {len(set(names))} different --name",
            wanted="a name of its own for every cheat",
            do="pass them in pairs: --against CHEAT.jsonl --name int4",
        )


def _refuse(chosen: "CalibrateSettings", names: Sequence[str], beside: str, reason: str) -> None:
    """Refuse flags that were given and do not belong to this form."""
    given = [name for name in names if getattr(chosen, name) not in (None, ())]
    if given:
        flag = chosen.flags(given[0])[-1]
        raise UsageError(f"{flag} with {beside}", wanted=f"no {flag}: {reason}", do=f"leave {flag} out")


def _of_proofs(chosen: "CalibrateSettings", proofs: "Sequence[Proof]") -> "Calibration":
    from assay import poc
    from assay.models.load import model_info

    against = {name: poc.Proof.load(path) for name, path in zip(chosen.name, chosen.against, strict=True)}
    info = None if chosen.model is None else model_info(chosen.model)
    size, mixture = (None, None) if info is None else (info.hidden_size, info.experts > 0)
    with progress_bar("leaving out", "machines") as progress:
        return poc.calibrate(*proofs, hidden_size=size, mixture=mixture, against=against, progress=progress)


def _of_vectors(chosen: "CalibrateSettings", path: Path) -> "Calibration":
    from assay.poc.verdict.calibrate import calibrate_vectors, read_vector_sets

    sets = read_vector_sets(path)
    found = [one for one in sets if _is_chosen(one, chosen.sets)]
    if len(found) < 2:
        names = ", ".join(one.name for one in sets)
        raise UsageError(
            f"{len(found)} of the {len(sets)} sets of --vectors chosen",
            wanted="two or more of one build",
            do=f"choose with --sets among {names:.300}",
        )
    against = {name: read_vector_sets(other) for name, other in zip(chosen.name, chosen.against, strict=True)}
    with progress_bar("leaving out", "machines") as progress:
        return calibrate_vectors(found, digest=chosen.digest, against=against, progress=progress)


def _is_chosen(one: "VectorSet", words: Sequence[str]) -> bool:
    """Return whether a set's name has all of the words, and none of those that begin with a dash."""
    return all(word[1:] not in one.name if word.startswith("-") else word in one.name for word in words)


def _show(measured: "Calibration", path: Path, as_json: bool) -> None:
    from assay.poc.verdict.builds import ENOUGH_OF_MIXTURE

    for build in measured.builds:
        engines = [fingerprint.as_dict() for fingerprint in build.known]
        stated = {name: dict.fromkeys(str(one[name]) for one in engines) for name in (engines or [{}])[0]}
        other = [f"{name} {' / '.join(found)}" for name, found in stated.items() if len(found) > 1]
        values: dict[str, Any] = {
            "path": str(path),
            "preset": build.preset,
            "checkpoint": build.digest,
            "output": build.output,
            "machines": len(build.machines),
            "law": str(build.noise.law),
            "typical_residual": build.noise.sizes.typical,
            "between_machines": build.noise.spread.sd,
            "n": build.n,
            "hidden_size": build.hidden_size or None,
            "effect": build.effect,
            "named": ", ".join(build.named) or "nothing",
            "engines_differ_in": ", ".join(other) or "nothing",
        }
        if caution := build.caution():
            values["warning"] = caution
        elif build.mixture is None and build.caution(mixture=True):
            values["advice"] = (
                f"for a mixture of experts, take {ENOUGH_OF_MIXTURE} nonces or more, and --model: another law may "
                "accuse it"
            )
        left_out = build.left_out
        if left_out is not None:
            values["left_out_accused"] = left_out.accused
            values["left_out_interval"] = [left_out.low, left_out.high]
            values["left_out_worst_pair"] = left_out.worst
            values["left_out_audits"] = left_out.pairs * left_out.audits
        show_values(SCHEMA, values, as_json)
