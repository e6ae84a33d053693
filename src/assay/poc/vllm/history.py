"""The tokens of prompts and outputs, as penalties read them, kept beside the steps of an engine.

Shapes: N requests of a step, V tokens of the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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
