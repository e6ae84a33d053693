"""``assay poc calibrate --valid-rate``: the r_target of a wanted valid rate, in closed form and from proofs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from assay.cli._output import show_values
from assay.errors import ProofMismatch, UsageError

if TYPE_CHECKING:
    from assay.cli._poc_settings import CalibrateSettings
    from assay.poc import BlockFactor, Proof

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

    rate = chosen.valid_rate or 0.0
    size = stats.RANDOM_HEAD_ROWS if chosen.dimension is None else chosen.dimension
    values: dict[str, object] = {"valid_rate": rate, "dimension": size, "r_target": stats.r_target_for(rate, size)}
    if size == stats.RANDOM_HEAD_ROWS:
        given = chosen.effective_dimension
        law = stats.BlockLaw(dimension=size, freedom=stats.EFFECTIVE_DIMENSION if given is None else given)
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
    from assay import load_model, poc

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
