"""What a request carries to vLLM's workers, in ``extra_args`` of its ``SamplingParams``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
