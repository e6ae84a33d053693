"""The verifier's side: receipts as a node writes them, replayed as any node's, with what the rivals need kept beside.

Legend of shapes: N tokens of a response, D hidden size, K reported tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from assay.models.load import Model
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.pipelines import SKETCH_EVERY
from assay.poc.protocol.record import Fingerprint
from assay.poc.responses.adapters import Lora
from assay.poc.responses.prefill import HFPrefill, Prefilled, PromptAndOutput, sketch_response
from assay.poc.responses.receipts import Prompt, Receipt, ReceiptHeader, Receipts
from assay.poc.responses.replay import Replayed, replay
from assay_research.responses.provers import Requests, Served
from assay_research.responses.rivals import Reply

BATCH = 8  # sequences of the verifier's batches


@dataclass(frozen=True)
class Checked:
    """What the verifier knows of one response.

    Args:
        replayed: Result of the replay.
        reply: What the rivals score.
    """

    replayed: Replayed
    reply: Reply


def check(requests: Requests, served: Served, prover: Model, verifier: Model) -> list[Checked]:
    """Return what the verifier knows of every response.

    Args:
        requests: Requests that were answered.
        served: Answers.
        prover: Model that the prover claims to have run.
        verifier: Model that replays them.
    """
    engine = _Keeping(verifier, served)
    return [
        Checked(one, engine.reply(row, one))
        for row, one in enumerate(replay(receipts(requests, served, prover), verifier, engine=engine))
    ]


def receipts(requests: Requests, served: Served, prover: Model) -> Receipts:
    """Return what the prover states of its answers."""
    seed, positions = requests.seeds[0], requests.prompts.shape[1] + served.tokens.shape[1]
    header = ReceiptHeader(
        public_key=seed.public_key,
        reference=prover.reference,
        digest=prover.digest,
        weights=prover.weights,
        fingerprint=HFEngine(prover, batch_size=len(requests.seeds), seq_len=positions).fingerprint,
    )
    stated = [_receipt(requests, served, row) for row in range(len(requests.seeds))]
    return Receipts.build(header, stated, seconds=0.0)


def _receipt(requests: Requests, served: Served, row: int) -> Receipt:
    seed, states_ND = requests.seeds[row], served.states[row]
    every = range(0, len(states_ND), SKETCH_EVERY)
    return Receipt(
        request_id=seed.request_id,
        user_seed=seed.user_seed,
        block_hash=seed.block_hash,
        prompt=Prompt.of(requests.prompts[row].tolist()),
        output=tuple(served.tokens[row].tolist()),
        sketches=sketch_response(states_ND[::SKETCH_EVERY], seed.words("sketch"), every).cpu().numpy(),
        sampling=requests.sampling,
        finish="length",
    )


class _Keeping:
    """The verifier's engine, which keeps its hidden states and what it says of the reported tokens."""

    def __init__(self, model: Model, served: Served) -> None:
        self._engine, self._served = HFPrefill(model, batch_size=BATCH), served
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def fingerprint(self) -> Fingerprint:
        """How it computes."""
        return self._engine.fingerprint

    def run(self, responses: Sequence[PromptAndOutput], adapter: Lora | None = None) -> Iterator[tuple[int, Prefilled]]:
        """Run the responses."""
        for row, prefilled in self._engine.run(responses, adapter):
            assert prefilled.hidden is not None, "this engine shows them"
            own_NK = prefilled.logits.double().log_softmax(-1).gather(-1, self._served.top_ids[row])
            self._kept[row] = own_NK, prefilled.hidden
            yield row, prefilled

    def reply(self, row: int, replayed: Replayed) -> Reply:
        """Return what the rivals score of a response."""
        own_NK, own_ND = self._kept[row]
        sampling = replayed.receipt.sampling
        assert sampling is not None, "every prover here states it"
        return Reply(
            # Margins are in units of the noise, which are as many of the logits as the temperature says.
            margins=replayed.margins.astype(np.float64) * (sampling.temperature or 1.0),
            logprobs=self._served.top_logprobs[row],
            own_logprobs=own_NK,
            states=self._served.states[row],
            own_states=own_ND,
        )
