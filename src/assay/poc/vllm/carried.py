"""What a request carries to vLLM's workers, in ``extra_args`` of its ``SamplingParams``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.poc.responses.sampling import Sampling

ARGUMENT = "assay"
"""Key of ``extra_args``. What a client puts there is thrown away before a request reaches the workers."""


@dataclass(frozen=True)
class Carried:
    """What the workers need to know of one response.

    Args:
        prompt: Number of tokens of the prompt.
        sketch: Words of the stream of projections, 8 integers in [0, 2**32).
        tokens: Words of the stream of noise; None where the engine samples by itself.
        sampling: Parameters of sampling, where it does not.
    """

    prompt: int
    sketch: tuple[int, ...]
    tokens: tuple[int, ...] | None = None
    sampling: Sampling | None = None

    def as_argument(self) -> dict[str, Any]:
        """Return plain values, which vLLM sends from process to process."""
        if self.sampling is None:
            return dict(vars(self))
        # MessagePack has no maps with integer keys where vLLM decodes them.
        biases = [[token, bias] for token, bias in self.sampling.logit_bias.items()]
        return vars(self) | {"sampling": vars(self.sampling) | {"logit_bias": biases}}


def keeping_states(prompt: int) -> dict[str, Any]:
    """Return the ``extra_args`` of a request whose states are kept as they are, from the end of the prompt on."""
    return {ARGUMENT: Carried(prompt, (0,) * 8).as_argument()}


def carried_by(params: Any) -> Carried | None:
    """Return what a ``SamplingParams`` of vLLM carries; None for requests that are not recorded."""
    values = (getattr(params, "extra_args", None) or {}).get(ARGUMENT)
    if not isinstance(values, dict):
        return None
    sampling = values["sampling"]
    return Carried(
        prompt=values["prompt"],
        sketch=tuple(values["sketch"]),
        tokens=None if values["tokens"] is None else tuple(values["tokens"]),
        sampling=None if sampling is None else Sampling(**sampling | {"logit_bias": dict(sampling["logit_bias"])}),
    )


def as_words(words: Sequence[int] | NDArray[np.uint32]) -> tuple[int, ...]:
    """Return the words of a stream as plain integers."""
    return tuple(int(word) for word in words)


# --------------------------------------------------------------------------------------------------
# The tokens of prompts and outputs, as penalties read them, kept beside the steps of an engine.
#
# Shapes: N requests of a step, V tokens of the vocabulary.


class History:
    """Which tokens the prompts have, and how often the outputs have each token so far.

    Args:
        prompts: Token ids of every prompt.
        vocab_size: Number V of tokens of the vocabulary.
        device: Device of the logits.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> None:
        self._device, self._vocab_size = device, vocab_size
        self._prompt_NV = torch.zeros((len(prompts), vocab_size), dtype=torch.bool, device=device)
        self._counts_NV = torch.zeros((len(prompts), vocab_size), dtype=torch.int32, device=device)
        self._lengths = [0] * len(prompts)
        rows, tokens = self._places(list(enumerate(prompts)))
        self._prompt_NV[rows, tokens] = True

    def update(self, outputs: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Count the tokens that are new since the last call; return what a ``Sampler`` takes."""
        new = [(row, output[length:]) for row, (output, length) in enumerate(zip(outputs, self._lengths, strict=True))]
        self._lengths = [len(output) for output in outputs]
        rows, tokens = self._places(new)
        if len(rows):
            self._counts_NV.index_put_((rows, tokens), torch.ones_like(rows, dtype=torch.int32), accumulate=True)
        return {"prompt_NV": self._prompt_NV, "counts_NV": self._counts_NV}

    def _places(self, listed: Sequence[tuple[int, Sequence[int]]]) -> tuple[Tensor, Tensor]:
        # Tokens that are not there yet have negative ids, and a prompt may have ids that no logit stands for.
        pairs = [(row, token) for row, tokens in listed for token in tokens if 0 <= token < self._vocab_size]
        places = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).to(self._device, non_blocking=True)
        return places[:, 0], places[:, 1]
