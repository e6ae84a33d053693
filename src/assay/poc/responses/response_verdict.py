"""The judge of responses: their pins, and a replay against the honest noise of two engines."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from assay import streams
from assay.errors import ProofMismatch, UsageError
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pins import Pins
from assay.poc.protocol.pins_file import NetworkPins
from assay.poc.responses.receipts import Prompt, Receipt, ReceiptHeader, Receipts
from assay.poc.responses.requests import Request
from assay.poc.responses.response_calibration import ResponseCalibration, bundled_response_noise
from assay.poc.verdict.entries import RESPONSES, Account, LedgerUpdate, response_identity
from assay.poc.verdict.proof_judge import EXIT_CODES
from assay.poc.verdict.response_noise import ResponseNoise, ResponseResult, ResponseTest
from assay.stats.e_values import Outcome

if TYPE_CHECKING:
    from assay.poc.responses.replaying import ReplayedResponse

Evidence = Literal["both", "tokens", "sketches"]
"""What receipts must have: tokens that were sampled with seeds, sketches, or both."""


@dataclass(frozen=True, kw_only=True)
class ReceiptPins:
    """Values that a validator fixes before it reads receipts; None leaves one open.

    Whatever is not given is taken on the node's word, and :meth:`unpinned` names it. Without the
    requests a node may answer other ones than were asked, or choose their ids until it likes the
    noise. A node that leaves sketches out, or says that its engine sampled by itself or that a
    grammar was used, takes evidence away.

    Args:
        known: Block, key, checkpoint and builds; its values of rounds are not looked at.
        requests: Requests that were sent to the node.
        evidence: What the receipts must have.
    """

    known: Pins = field(default_factory=Pins)
    requests: Sequence[Request] | None = None
    evidence: Evidence = "both"

    @classmethod
    def of_network(
        cls, network: NetworkPins | None, pins_of_flags: Pins, header: ReceiptHeader, **more: Any
    ) -> "ReceiptPins":
        """Return the pins of a network's file and flags; a UsageError where they disagree."""
        pins = pins_of_flags
        if network is not None:
            shares = [
                node.node_id
                for node in network.nodes
                if node.public_key == pins_of_flags.public_key
            ]
            pins = network.for_round(
                model=header.digest, also=pins_of_flags, node_id=shares[0] if shares else None
            )
        return cls(known=pins, **more)

    def check(self, receipts: Receipts) -> None:
        """Refuse receipts that contradict a pin.

        Only prompts of token ids are compared: :func:`assay.poc.responses.requests.encode_requests`
        gives them to all.

        Raises:
            ProofMismatch: Names the value, stated and wanted.
        """
        header = receipts.header
        pins = self.known
        stated = {
            "public_key": header.public_key,
            "digest": header.digest,
            "weights": header.weights,
        }
        for name, value in stated.items():
            pinned = getattr(pins, name)
            if pinned is not None and pinned != value:
                raise _mismatch("receipts", name, value, pinned)
        pins.check_engine(header.fingerprint, "receipts")
        requests_by_name = {request.name: request for request in self.requests or ()}
        for receipt in receipts.receipts:
            if pins.block_hash is not None and receipt.block_hash != pins.block_hash:
                raise _mismatch(
                    f"the receipt of request {receipt.request_id!r:.80}",
                    "block_hash",
                    receipt.block_hash,
                    pins.block_hash,
                )
            if self.requests is not None:
                _check_request(receipt, requests_by_name)

    def unpinned(self, receipts: Receipts) -> tuple[str, ...]:
        """Return the names of the values that are taken on the node's word."""
        header = receipts.header
        pins = self.known
        unseen = [receipt for receipt in receipts.receipts if not receipt.seeded]
        is_pinned = {
            "block_hash": pins.block_hash is not None,
            "public_key": pins.public_key is not None,
            # Texts and messages are not compared: a caller encodes them before it pins them.
            "requests": self.requests is not None
            and all(isinstance(request.prompt, tuple) for request in self.requests),
            "prover_dtype": bool(pins.formats) or header.fingerprint.dtype in streams.DTYPES,
            "tokens": self.evidence == "sketches" or not unseen,
            "sketches": self.evidence == "tokens" or header.sketched,
        }
        return tuple(name for name, pinned in is_pinned.items() if not pinned)


def _check_request(
    receipt: Receipt, requests_by_name: Mapping[tuple[str, str, int], Request]
) -> None:
    """Refuse a receipt that answers no request, or another one than was asked."""
    request = requests_by_name.get(receipt.name)
    owner = f"the receipt of request {receipt.request_id!r:.80}"
    if request is None:
        raise _mismatch(
            "a receipt",
            "user_seed, request_id and index",
            receipt.name,
            "of a request that was sent",
        )
    pairs: dict[str, tuple[object, object]] = {
        "adapter": ("" if receipt.adapter is None else receipt.adapter.name, request.adapter)
    }
    if request.chosen_by == "client":
        pairs["chosen_by"] = receipt.chosen_by, "client"
    if receipt.sampling is not None:
        requested = request.sampling.as_dict()
        # The likeliest token passes every filter, so vLLM sets them back where it is taken.
        unused = ("top_k", "top_p", "min_p") if receipt.sampling.greedy else ()
        pairs |= {
            name: (value, requested[name])
            for name, value in receipt.sampling.as_dict().items()
            if name not in unused
        }
    if receipt.chat_template is not None and request.chat_template is not None:
        # First, as it explains another prompt.
        pairs["chat_template"] = (receipt.chat_template, request.chat_template)
    if isinstance(request.prompt, tuple):
        pairs["prompt"] = receipt.prompt.sha256, Prompt.of(request.ids).sha256
    for name, (stated, agreed) in pairs.items():
        if stated != agreed:
            raise _mismatch(owner, name, stated, "none" if agreed == "" else agreed)
    tokens = len(receipt.output)
    if tokens > request.max_tokens or (receipt.finish == "length" and tokens < request.max_tokens):
        raise _mismatch(owner, "tokens", f"{tokens}, ended by {receipt.finish}", request.max_tokens)


def _mismatch(owner: str, name: str, stated: object, wanted: object) -> ProofMismatch:
    return ProofMismatch(
        f"{owner} with {name} {stated!r:.60}",
        wanted=f"{name} {wanted!s:.80}",
        do="ask the node for the receipts of these requests",
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ResponseVerdict:
    """The result of a replay.

    Args:
        result: All numbers of the test; None without a law of honest noise, so that the verdict is
            undecided.
        reason: Numbers that decided, in one sentence.
        noise: Measured honest noise, and where it comes from; None where none was measured.
        replayed: What the replay gave, in the order in which it was judged.
        receipts: Receipts of which these are all or a sample.
        pins: Values that the validator gave, with which the receipts agree.
        sample_seed: Number that draws the same sample again; None where all were replayed.
    """

    result: ResponseResult | None
    reason: str
    noise: ResponseNoise | None
    replayed: "tuple[ReplayedResponse, ...]"
    receipts: Receipts
    pins: ReceiptPins
    sample_seed: int | None

    @property
    def verdict(self) -> Outcome:
        """``honest``, ``fraud`` or ``undecided``."""
        return "undecided" if self.result is None else self.result.verdict

    @property
    def unpinned(self) -> tuple[str, ...]:
        """Names of the values that were taken on the node's word."""
        return self.pins.unpinned(self.receipts)

    @property
    def unanswered(self) -> int:
        """Number of requests without a receipt, or with an aborted or empty answer.

        A node chooses which answers it shows: those that it would rather not have replayed may be
        among these. Every whole answer has the token that ended it.
        """
        replied = {
            receipt.name
            for receipt in self.receipts.receipts
            if receipt.finish != "abort" and receipt.output
        }
        return len({request.name for request in self.pins.requests or ()} - replied)

    @property
    def exit_code(self) -> int:
        """0 honest, all requests answered and everything pinned; 1 fraud; 2 otherwise."""
        honest = self.verdict == "honest"
        return 2 if honest and (self.unpinned or self.unanswered) else EXIT_CODES[self.verdict]

    @property
    def tokens(self) -> int:
        """Number of the tokens that were compared."""
        return sum(len(response.margins) for response in self.replayed)

    @property
    def matches(self) -> int:
        """Number of these that are the verifier's own."""
        return sum(response.matches for response in self.replayed)

    def updates(self) -> list[LedgerUpdate]:
        """Return the ledger entries: one for every response, in blocks of 32 tokens."""
        if self.noise is None:
            raise UsageError(
                self.reason, wanted="a verdict with a law", do="measure it, and judge again"
            )
        header = self.receipts.header
        account = Account(
            public_key=header.public_key,
            digest=header.digest,
            build=self.pins.known.build_of(header.fingerprint),
            preset=RESPONSES,
        )
        return [
            LedgerUpdate(
                account=account,
                round=response_identity(header.seed(response.receipt).text()),
                block_hash=response.receipt.block_hash,
                noise=self.noise,
                nonces=range(len(blocks)),
                residuals=blocks.distances.tolist(),
                profiles=blocks.text,
                proof=self.receipts.footer.sha256,
                sample_seed=self.sample_seed,
            )
            for response in self.replayed
            if len(blocks := response.blocks)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON-ready values, with a row for every response."""
        header = self.receipts.header
        rows = [
            {
                "request_id": response.receipt.request_id,
                "index": response.receipt.index,
                "tokens": len(response.receipt.output),
                "compared": len(response.margins),
                "matches": response.matches,
                "margins": [float(x) if math.isfinite(x) else None for x in response.margins],
                "residuals": response.residuals.tolist(),
            }
            for response in self.replayed
        ]
        return {
            "schema": "assay.poc.replay/1",
            "verdict": self.verdict,
            "reason": self.reason,
            "receipts": self.receipts.footer.receipts,
            "replayed": len(self.replayed),
            "tokens": self.tokens,
            "matches": self.matches,
            "test": None if self.result is None else asdict(self.result),
            "noise": None if self.noise is None else self.noise.as_dict(),
            "responses": rows,
            "public_key": header.public_key,
            "digest": header.digest,
            "dtype": header.fingerprint.dtype,
            "sample_seed": self.sample_seed,
            "unpinned": self.unpinned,
            "unanswered": self.unanswered,
        }


@np.errstate(under="ignore")
def judge_responses(
    replayed: "Sequence[ReplayedResponse]",
    receipts: Receipts,
    noise: ResponseNoise | None,
    *,
    pins: ReceiptPins | None = None,
    alpha: float = 1e-3,
    sample_seed: int | None = None,
) -> ResponseVerdict:
    """Judge a replay; without a noise law the verdict is undecided.

    Args:
        replayed: What the replay gave, in an order that does not depend on it.
        receipts: Receipts that were replayed, or of which a sample was.
        noise: Honest noise between the two engines; None where none was measured.
        pins: Values that the validator gave, with which the receipts agree; nothing when None.
        alpha: Bound on the chance that an honest node is ever accused.
        sample_seed: Number that drew the sample; None where all were replayed.

    Raises:
        UsageError: A rate is out of range.
    """
    result = None
    reason = missing_response_law(receipts.header)
    if noise is not None:
        test = ResponseTest(noise, alpha=alpha)
        for response in replayed:
            test.update(response.blocks)
        result = test.result
        reason = _reason(result, alpha, noise)
    return ResponseVerdict(
        result=result,
        reason=reason,
        noise=noise,
        replayed=tuple(replayed),
        receipts=receipts,
        pins=pins or ReceiptPins(),
        sample_seed=sample_seed,
    )


def noise_between(
    header: ReceiptHeader, verifier: Fingerprint, calibration: ResponseCalibration | None
) -> ResponseNoise | None:
    """Return the noise between two engines, or None; a CalibrationError names the difference."""
    if calibration is None:
        return bundled_response_noise(header.digest, header.fingerprint.dtype, verifier.dtype)
    calibration.check(header, verifier)
    return calibration.noise


def missing_response_law(header: ReceiptHeader, model: str = "MODEL") -> str:
    """Return the sentence that responses have no law, with the commands that measure one.

    ``model`` is the reader's own reference: the node wrote the header.
    """
    return (
        f"no law of honest noise of responses was measured for checkpoint {header.digest[:12]} "
        f"and these number "
        "formats: have honest nodes answer prompts with `assay poc respond`, measure their "
        "receipts with "
        f"`assay poc calibrate-responses honest.jsonl --model {shlex.quote(model)} -o "
        f"responses.json`, and pass --calibration"
    )


def sample_receipts(receipts: Receipts, sample: int | None, seed: int) -> Receipts:
    """Return receipts with a sample of those that have tokens, in file order.

    Raises:
        UsageError: The file has no response with a token, or the sample is larger than the file.
    """
    replied = [receipt for receipt in receipts.receipts if receipt.output]
    size = len(replied) if sample is None else sample
    if not replied or type(size) is not int or not 1 <= size <= len(replied):
        seen = f"a sample of {size} receipts" if replied else "receipts without a token"
        wanted = (
            f"1 to {len(replied)}, the responses of this file"
            if replied
            else "one response or more"
        )
        raise UsageError(
            seen,
            wanted=wanted,
            do="change --sample" if replied else "ask the node for its receipts",
        )
    if sample is None:
        return receipts
    chosen = sorted(
        np.random.default_rng(seed).choice(len(replied), size=size, replace=False).tolist()
    )
    return replace(receipts, receipts=tuple(replied[index] for index in chosen))


def _reason(result: ResponseResult, alpha: float, noise: ResponseNoise) -> str:
    parts = {"tokens": result.tokens, "sketches": result.sketches}
    measured = {name: part for name, part in parts.items() if part.n}
    if result.verdict == "fraud":
        loudest = max(measured, key=lambda name: measured[name].log_e_max)
        return f"e-value e^{result.log_e_max:.1f} passes 1/{alpha:g}, most of it by the {loudest}"
    weakest = min(measured, key=lambda name: measured[name].log_evidence_honest, default="tokens")
    part = parts[weakest]
    against = f"evidence e^{part.log_evidence_honest:.1f} against {part.weakest} in the {weakest}"
    if result.verdict == "honest":
        excluded = noise.tokens.effect * noise.tokens.law.size
        return against + (
            f"; tokens exclude differences of logits of {excluded:.2g}" if result.tokens.n else ""
        )
    return (
        f"{result.n} blocks of {result.responses} responses are too few to decide: {against}; "
        f"replay more"
    )
