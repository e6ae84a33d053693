"""What a network promises its honest nodes: how many of them are ever convicted, and what is known of that number.

A network of N accounts that accepts K false convictions in all gives each α = K/N for its whole life, and Ville's
inequality bounds the expected number by K, if the law holds for every machine. On machines that were left out of the
law it is measured whether it does. As far as so few of them say, the upper end of the interval may be the share of
audits that accuse a new machine: of single audits under α = .001, and not of lives, where a noisier one shows more.
"""

from collections.abc import Iterable

from assay.errors import UsageError
from assay.files.jsonl import JsonObject
from assay.poc.protocol.pins_file import NetworkPins
from assay.poc.verdict.calibration import Calibration
from assay.poc.verdict.ledger import ALPHA


def account_alpha(pins: NetworkPins | None, given: float | None = None) -> float:
    """Return the bound on the chance that one honest account is ever convicted: that of the pins, the given one, .001.

    A UsageError refuses a given one that contradicts the pins.
    """
    stated = None if pins is None or pins.network is None else pins.network.alpha
    if stated is not None and given not in (None, stated):
        do = "leave alpha out, or correct [network] of the pins"
        raise UsageError(f"alpha {given:g}", wanted=f"{stated:g}, as [network] of the pins says", do=do)
    return next((alpha for alpha in (stated, given) if alpha is not None), ALPHA)


def describe_promise(pins: NetworkPins, alpha: float, calibrations: Iterable[Calibration]) -> JsonObject:
    """Return the nodes of a network, the false convictions that it accepts, alpha, and how many are to be expected.

    ``expected`` is the number of nodes times the larger of alpha and the upper end of the interval of the worst build;
    None where the pins state no number, or no machine was left out of a law. ``law_error`` says what it stands on.
    """
    stated: JsonObject = {"nodes": None, "false_convictions": None} if pins.network is None else vars(pins.network)
    builds = [build for calibration in calibrations for build in calibration.builds]
    # A law of one machine leaves out engines of that machine, and has no effect of its own.
    left = [build.left_out for build in builds if build.left_out is not None and build.effect is not None]
    if not left or len(left) < len(builds):
        return {**stated, "alpha": alpha, "expected": None, "law_error": "unknown beyond alpha: no machine left out"}
    worst = max(left, key=lambda one: one.high)
    error = f"{worst.low:.2%} to {worst.high:.2%} of audits of {worst.checked} nonces accuse machines left out"
    expected = stated["nodes"] and stated["nodes"] * max(alpha, worst.high)
    return {**stated, "alpha": alpha, "expected": expected, "law_error": error}
