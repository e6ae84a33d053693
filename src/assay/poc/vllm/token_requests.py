"""The serving side of decoding: nonces as requests of token ids, and the tokens that vLLM gives.

Legend of shapes: B nonces of a batch, M nonces of a stream, P positions of the prompt, N tokens, S sketches, K numbers
of a sketch.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.errors import UsageError, not_finite
from assay.poc.engines.decoding import Decoded, Replayed, drawn_prompts
from assay.poc.protocol.pipelines import SKETCH_SIZE, Pipeline, sketch_steps
from assay.poc.vllm.client import Asked, Client, RequestStream, Values, parameters
from assay.poc.vllm.decoding import CLAIMED
from assay.poc.vllm.rows import Spec


class TokenStream(RequestStream):
    """Runs nonces that decode, or replays tokens of others.

    Args:
        client: Client that runs single nonces.
        spec: Round, and its pipeline.
        nonces: Nonces in the order of the results.
        batch_size: Number of nonces that are handed out at a time.
        vocab_size: Number V of rows of the embedding.
        claimed_MN: Tokens that are replayed, for every nonce; None decodes.
    """

    def __init__(
        self,
        client: Client,
        spec: Spec,
        nonces: Sequence[int],
        batch_size: int,
        *,
        vocab_size: int,
        claimed_MN: NDArray[np.uint32] | None = None,
    ) -> None:
        super().__init__(client, spec, nonces, batch_size, self._asked)
        self._vocab_size, self._steps = vocab_size, spec.pipeline.steps
        self._claimed = None if claimed_MN is None else dict(zip(nonces, claimed_MN, strict=True))
        self._passes = 1 if self._claimed is not None else self._steps
        self._tokens: dict[int, list[int]] = {}
        self._done = 0

    def decoded(self, values: Values) -> Decoded:
        """Return the tokens and sketches of the next batch, of which the workers gave some values."""
        nonces = self._nonces[self._done : self._done + len(values)]
        self._done += len(values)
        tokens_BN = np.array([self._tokens.pop(nonce) for nonce in nonces], dtype=np.uint32)
        return Decoded(tokens_BN, self._split(values)[0])

    def replayed(self, values: Values) -> Replayed:
        """Return the margins and sketches of a batch, of which the workers gave some values."""
        sketches_BSK, margins_BN = self._split(values)
        return Replayed(margins_BN, sketches_BSK)

    def _split(self, values: Values) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        if np.isnan(values).any():  # an infinite margin is that of an id without a token
            raise not_finite("vLLM returned NaN or infinity")
        count = len(sketch_steps(self._steps))
        sketches, margins = np.split(values, [count * SKETCH_SIZE], axis=1)
        return sketches.reshape(-1, count, SKETCH_SIZE).astype(np.float16), margins.astype(np.float32)

    def _asked(self, nonce: int) -> Asked:
        """Return the request of a nonce: its prompt and the steps, or its prompt and the tokens that are replayed."""
        shape = {"seq_len": self._spec.round.seq_len, "vocab_size": self._vocab_size}
        prompt: list[int] = drawn_prompts(self._spec.round, [nonce], **shape)[0].tolist()
        if self._claimed is None:
            return Asked(prompt, _decoding(self._steps))
        claimed = self._claimed[nonce]
        given = np.minimum(claimed[:-1], self._vocab_size - 1)
        return Asked(prompt + given.tolist(), parameters(extra_args={CLAIMED: claimed.tolist()}))

    def _whole(self, nonce: int, outcome: Any) -> bool:
        """Return whether a nonce has all of its tokens, and keep them."""
        if isinstance(outcome, Exception) or outcome is None:
            return False
        if self._claimed is None:
            self._tokens[nonce] = list(outcome.outputs[0].token_ids)
        return self._claimed is not None or len(self._tokens[nonce]) == self._steps


def check_room(seq_len: int, pipeline: Pipeline, most_positions: int) -> None:
    """Refuse prompts and tokens that are longer than an engine takes.

    Raises:
        UsageError: They are; says which length fits.
    """
    if seq_len + pipeline.steps - 1 > most_positions:
        room = most_positions + 1 - pipeline.steps
        raise UsageError(
            f"{seq_len} positions and {pipeline.steps} tokens on this vLLM engine",
            wanted=f"at most {most_positions + 1} together",
            do=f"pass --seq-len {room}, or raise --max-model-len" if room > 0 else "raise --max-model-len",
        )


@cache
def _decoding(steps: int) -> Any:
    """Return the parameters of a nonce that decodes: the workers add the noise, and nothing ends the text early."""
    return parameters(steps, ignore_eos=True)
