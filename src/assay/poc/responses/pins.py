"""What a validator knows of responses before it replays their receipts, and what it takes on the node's word."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from assay import streams
from assay.errors import ProofMismatch, UsageError
from assay.poc.protocol.builds import nearest_build
from assay.poc.protocol.pins import Pins
from assay.poc.protocol.pins_file import NetworkPins
from assay.poc.responses.receipts import Prompt, Receipt, ReceiptHeader, Receipts
from assay.poc.responses.requests import Request

Evidence = Literal["both", "tokens", "sketches"]
"""What receipts must have: tokens that were sampled with seeds, sketches, or both."""


@dataclass(frozen=True, kw_only=True)
class ReceiptPins:
    """Values that a validator knows before it reads receipts; None where it gives nothing.

    Whatever is not given is taken on the node's word, and :meth:`unpinned` names it. Without the requests a node may
    answer other ones than were asked, or choose their ids until it likes the noise. A node that leaves sketches out, or
    says that its engine sampled by itself or that a grammar was used, takes evidence away.

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
        cls,
        network: NetworkPins | None,
        given: Pins,
        header: ReceiptHeader,
        *,
        requests: Sequence[Request] | None,
        evidence: Evidence,
    ) -> "ReceiptPins":
        """Return what a network's file and flags pin together.

        Args:
            network: File of a network, if there is one.
            given: Values of flags, which must agree with the file.
            header: Header of the receipts; the checkpoint that it states must be one of the file.
            requests: Requests that were sent to the node.
            evidence: What the receipts must have.

        Raises:
            UsageError: A flag contradicts the file, or the file needs another flag.
        """
        known = given
        if network is not None:
            shares = [node.node_id for node in network.nodes if node.public_key == given.public_key]
            known = network.for_round(model=header.digest, also=given, node_id=shares[0] if shares else None)
        return cls(known=known, requests=requests, evidence=evidence)

    def check(self, receipts: Receipts) -> None:
        """Refuse receipts that contradict a pin.

        A prompt of text is not compared: :func:`assay.poc.responses.requests.encode_requests` gives it token ids.

        Raises:
            ProofMismatch: Names the value, stated and wanted.
        """
        header, known = receipts.header, self.known
        stated = {"public_key": header.public_key, "digest": header.digest, "weights": header.weights}
        for name, value in stated.items():
            wanted = getattr(known, name)
            if wanted is not None and wanted != value:
                raise _mismatch("receipts", name, value, wanted)
        dtype = header.fingerprint.dtype
        if known.formats and dtype not in known.formats:
            raise _mismatch("receipts", "prover_dtype", dtype, " or ".join(known.formats))
        build, odd = nearest_build(known.builds or (), header.fingerprint)
        if odd:
            allowed = " or ".join(map(str, getattr(build, odd[0])))
            raise _mismatch("receipts", odd[0], getattr(header.fingerprint, odd[0]), allowed)
        asked = {_identity(one): one for one in self.requests or ()}
        for receipt in receipts.receipts:
            if known.block_hash is not None and receipt.block_hash != known.block_hash:
                raise _mismatch(_name(receipt), "block_hash", receipt.block_hash, known.block_hash)
            if self.requests is not None:
                _check_request(receipt, asked)

    def unpinned(self, receipts: Receipts) -> tuple[str, ...]:
        """Return the names of the values that are taken on the node's word."""
        header, known = receipts.header, self.known
        unseen = [receipt for receipt in receipts.receipts if not receipt.seeded]
        given = {
            "block_hash": known.block_hash is not None,
            "public_key": known.public_key is not None,
            # Texts are not compared: a caller encodes them before it pins them.
            "requests": self.requests is not None and not any(isinstance(one.prompt, str) for one in self.requests),
            "prover_dtype": bool(known.formats) or header.fingerprint.dtype in streams.DTYPES,
            "tokens": self.evidence == "sketches" or not unseen,
            "sketches": self.evidence == "tokens" or header.sketched,
        }
        return tuple(name for name, pinned in given.items() if not pinned)

    def unanswered(self, receipts: Receipts) -> int:
        """Return how many of the requests have no receipt, or one of an answer that was aborted or has no token.

        A node chooses which answers it shows: those that it would rather not have replayed may be among these. Every
        whole answer has the token that ended it.
        """
        whole = {_identity(one) for one in receipts.receipts if one.finish != "abort" and one.output}
        return len({_identity(request) for request in self.requests or ()} - whole)

    @property
    def prompts(self) -> dict[str, Prompt]:
        """Prompts of the requests that are token ids, by their SHA-256."""
        prompts = [Prompt.of(one.ids) for one in self.requests or () if not isinstance(one.prompt, str)]
        return {prompt.sha256: prompt for prompt in prompts}


def _identity(one: Receipt | Request) -> tuple[str, str, int]:
    return one.user_seed, one.request_id, one.index


def _check_request(receipt: Receipt, asked: Mapping[tuple[str, str, int], Request]) -> None:
    """Refuse a receipt that answers no request, or another one than was asked."""
    request = asked.get(_identity(receipt))
    if request is None:
        alike = [one for one in asked.values() if one.request_id == receipt.request_id]
        if not alike:
            raise _mismatch("a receipt", "request_id", receipt.request_id, "a request that was sent")
        name = "user_seed" if all(one.user_seed != receipt.user_seed for one in alike) else "index"
        wanted = " or ".join(sorted({repr(getattr(one, name)) for one in alike})[:4])
        raise _mismatch(_name(receipt), name, getattr(receipt, name), wanted)
    if request.adapter != (answered := "" if receipt.adapter is None else receipt.adapter.name):
        raise _mismatch(_name(receipt), "adapter", answered, request.adapter or "none")
    if request.chosen_by == "client" and receipt.chosen_by != "client":
        raise _mismatch(_name(receipt), "chosen_by", receipt.chosen_by, "client")
    if receipt.sampling is not None and receipt.sampling != request.sampling:
        one, other = receipt.sampling.as_dict(), request.sampling.as_dict()
        name = next(name for name in one if one[name] != other[name])
        raise _mismatch(_name(receipt), name, one[name], other[name])
    if not isinstance(request.prompt, str) and receipt.prompt != (own := Prompt.of(request.ids)):
        raise _mismatch(_name(receipt), "prompt", receipt.prompt.sha256[:12], own.sha256[:12])
    tokens = len(receipt.output)
    if tokens > request.max_tokens or (receipt.finish == "length" and tokens < request.max_tokens):
        raise _mismatch(_name(receipt), "tokens", f"{tokens}, ended by {receipt.finish}", f"{request.max_tokens}")


def _name(receipt: Receipt) -> str:
    return f"the receipt of request {receipt.request_id!r:.80}"


def _mismatch(owner: str, name: str, stated: object, wanted: object) -> ProofMismatch:
    return ProofMismatch(
        f"{owner} with {name} {stated!r:.60}",
        wanted=f"{name} {wanted!s:.80}",
        do="ask the node for the receipts of these requests",
    )


def chosen_receipts(receipts: Receipts, sample: int | None) -> int:
    """Return how many receipts are to be replayed.

    Raises:
        UsageError: The file has no response with a token, or the sample is larger than the file.
    """
    total = sum(bool(receipt.output) for receipt in receipts.receipts)
    size = total if sample is None else sample
    if total == 0 or type(size) is not int or not 1 <= size <= total:
        raise UsageError(
            f"a sample of {size} receipts" if total else "receipts without a token",
            wanted=f"1 to {total}, the responses of this file" if total else "one response or more",
            do="lower --sample" if total else "ask the node for its receipts",
        )
    return size
