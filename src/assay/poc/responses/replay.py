"""Replay: one prefill of prompt and output, and how far every token and sketch is from what it gives.

Legend of shapes: N tokens, S sketches, G columns of a profile.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay.errors import ProofMismatch
from assay.models.load import Model
from assay.poc.protocol.pipelines import sketch_steps
from assay.poc.responses.adapters import Lora
from assay.poc.responses.margins import measure_margins
from assay.poc.responses.prefill import HFPrefill, Prefill, Prefilled, PromptAndOutput, sketch_response
from assay.poc.responses.receipts import Prompt, Receipt, ReceiptHeader, Receipts
from assay.poc.verdict.noise import ResponseBlocks
from assay.stats.tokens import COLUMNS

Progress = Callable[[int, int], None]
"""Called with (receipts done, receipts in all) after every receipt."""


@dataclass(frozen=True, eq=False)
class Replayed:
    """A receipt beside what a prefill of it gives.

    Args:
        receipt: Receipt that was replayed.
        margins: Largest score minus that of the claimed token, [N]; empty where tokens say nothing: without seeded
            sampling, or where a grammar forbade tokens that the receipt does not name.
        profiles: Log-probability of the claimed tokens at every scale of the noise, [N, G], likewise.
        residuals: L2 distances of the sketches, [S]; empty where the engine of one side has none.
    """

    receipt: Receipt
    margins: NDArray[np.float32]
    profiles: NDArray[np.float64]
    residuals: NDArray[np.float64]

    @property
    def matches(self) -> int:
        """Number of tokens that are the verifier's own."""
        return int(np.count_nonzero(self.margins == 0))

    @property
    def blocks(self) -> ResponseBlocks:
        """The evidence, by blocks of 32 tokens."""
        steps = sketch_steps(len(self.receipt.output))
        distances = self.residuals if len(self.residuals) else np.full(len(steps), np.nan)
        return ResponseBlocks.whole(distances, self.profiles)


def replay(
    receipts: Receipts,
    model: Model,
    *,
    prompts: Mapping[str, Prompt] | None = None,
    adapter: Lora | None = None,
    engine: Prefill | None = None,
    progress: Progress | None = None,
) -> list[Replayed]:
    """Run the responses of receipts again, each by one prefill.

    Args:
        receipts: Receipts of one node and model.
        model: Same checkpoint on this machine; its dtype and device may differ from the node's.
        prompts: Prompts with ids by their SHA-256, for receipts that have the hash alone.
        adapter: LoRA adapter with which the receipts that name one are run.
        engine: Engine that runs them; the transformers engine when None.
        progress: Function that is called with (receipts done, receipts in all) after every receipt.

    Returns:
        One result for every receipt with at least one token, in their order.

    Raises:
        ProofMismatch: The receipts are of another checkpoint or adapter, a token is not in its vocabulary, a response
            is longer than its positions, or the ids of a prompt are not known.
        BadWeights: The model gives NaN or infinity.
        OutOfMemory: The device has no room for a batch.

    Example:
        >>> import assay
        >>> from assay.poc.responses import replay, respond
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> made = respond(model, ["def add(a, b):"], block_hash="B", public_key="K", max_tokens=8)
        >>> (found,) = replay(made, model)
        >>> found.matches, found.residuals.shape, float(found.residuals[0]) < 1e-3
        (8, (1,), True)
    """
    check_adapter(receipts, adapter)
    wholes = check_runnable(receipts, model, prompts=prompts)
    chosen = [receipt for receipt in receipts.receipts if receipt.output]
    engine = engine or HFPrefill(model)
    found: dict[int, Replayed] = {}
    for used in (None, adapter) if adapter is not None else (None,):
        places = [place for place, one in enumerate(chosen) if (one.adapter is None) == (used is None)]
        for index, prefilled in engine.run([wholes[place] for place in places], used) if places else ():
            place = places[index]
            found[place] = _compare(receipts.header, chosen[place], wholes[place], prefilled)
            if progress:
                progress(len(found), len(chosen))
    return [found[place] for place in range(len(chosen))]


def check_runnable(
    receipts: Receipts, model: Model, *, prompts: Mapping[str, Prompt] | None = None
) -> list[PromptAndOutput]:
    """Return the responses of receipts that have tokens, with the ids of their prompts; refuse what a model cannot run.

    :func:`replay` begins with this. To call it before a ledger is begun, or before other files are replayed, saves
    both for receipts that are refused.

    Args:
        receipts: Receipts of one node and model.
        model: Same checkpoint on this machine.
        prompts: Prompts with ids by their SHA-256, for receipts that have the hash alone.

    Raises:
        ProofMismatch: The receipts are of another checkpoint, a token is not in its vocabulary, a response is longer
            than its positions, or the ids of a prompt are not known.
    """
    check_model(receipts.header, model)
    return [_whole(receipt, prompts or {}, model) for receipt in receipts.receipts if receipt.output]


def check_model(header: ReceiptHeader, model: Model) -> None:
    """Refuse receipts of another checkpoint than the one that is loaded.

    Raises:
        ProofMismatch: Names both.
    """
    if (header.digest, header.weights) != (model.digest, model.weights):
        raise ProofMismatch(
            f"receipts of {header.reference:.80} ({header.weights}, {header.digest[:12]})",
            wanted=f"receipts of {model.reference} ({model.weights}, {model.digest[:12]})",
            do="replay with the checkpoint that the network agreed on (--model)",
        )


def check_adapter(receipts: Receipts, adapter: Lora | None) -> None:
    """Refuse receipts of another adapter than the one that is given: what it changes is no fraud of the model.

    Raises:
        ProofMismatch: Names the request and both adapters.
    """
    for receipt in receipts.receipts:
        stated = receipt.adapter
        if stated is not None and (adapter is None or stated.digest != adapter.digest):
            raise ProofMismatch(
                f"request {receipt.request_id!r:.80} answered with the adapter {stated.name!r:.80} "
                f"({stated.digest[:12]})",
                wanted="no adapter" if adapter is None else f"the adapter in {adapter.path} ({adapter.digest[:12]})",
                do="pass --lora to `assay poc replay`, with the directory of that adapter",
            )


def _compare(header: ReceiptHeader, receipt: Receipt, whole: PromptAndOutput, prefilled: Prefilled) -> Replayed:
    seed = header.seed(receipt)
    margins, profiles = np.zeros(0, np.float32), np.zeros((0, COLUMNS))
    if receipt.sampling is not None and receipt.seeded:
        measured = measure_margins(
            prefilled.logits,
            whole.output,
            receipt.sampling,
            seed.step_seeds(range(len(whole.output))),
            prompt=whole.prompt,
            whole=prefilled.whole,
        )
        margins, profiles = measured.margins, measured.profiles
    residuals = np.zeros(0)
    if len(receipt.sketches):
        steps = sketch_steps(len(whole.output))
        own = sketch_response(prefilled.sketched, seed.words("sketch"), steps).cpu().numpy()
        residuals = np.linalg.norm(receipt.sketches.astype(np.float64) - own.astype(np.float64), axis=1)
    return Replayed(receipt, margins, profiles, residuals)


def _whole(receipt: Receipt, prompts: Mapping[str, Prompt], model: Model) -> PromptAndOutput:
    """Return a response with the ids of its prompt; refuse one that the model cannot run."""
    known = receipt.prompt if receipt.prompt.ids is not None else prompts.get(receipt.prompt.sha256)
    if known is None or known.ids is None:
        raise ProofMismatch(
            f"request {receipt.request_id!r:.80} with the hash of a prompt, {receipt.prompt.sha256[:12]}",
            wanted="its token ids: a prefill begins with them",
            do="pass --requests with the prompt that was sent",
        )
    ids = (*known.ids, *receipt.output)
    biased = () if receipt.sampling is None else receipt.sampling.logit_bias
    vocabulary, positions = model.vocab_size, model.max_positions
    if (highest := max((*ids, *biased))) >= vocabulary or len(ids) > positions:
        raise ProofMismatch(
            f"request {receipt.request_id!r:.80} with token {highest} and {len(ids)} positions",
            wanted=f"tokens below {vocabulary} and at most {positions} positions, as the model has them",
            do="ask the node for receipts of this model",
        )
    return PromptAndOutput(known.ids, receipt.output)
