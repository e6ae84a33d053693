"""Which rows may share a forward pass, so that each row computes as if it were alone.

The definition: what gives a token is a pass of that row alone, over its own tokens so far. Some
configurations say that what a pass computes follows its longest position, once that is beyond a
limit:

- LongRoPE rotates by short factors up to the length that the model was first trained on, and by
  long ones beyond.
- Dynamic NTK rotates by other factors for every length beyond the limit.
- Attention that chooses its keys has a choice where there are more than the limit, and among all
  keys of the pass.

A row beside a longer one would then be computed as the other is, and keys in a cache as they were
when they came. So rows share a pass where :func:`pass_kind` of their lengths is equal, and where it
changes while a row grows the row is computed anew from its tokens (:func:`steps_of_passes`).
transformers does the same when Phi-3 generates. A loss is of one pass over the whole sample, as in
training.
"""

from collections.abc import Hashable, Iterator
from itertools import pairwise
from typing import Any

from assay.errors import ModelError

_CHOSEN_KEYS = {
    "index_topk": True,
    "index_topk_blocks": True,
    "indexer_n_heads": False,
    "keep_window_size": False,
}
"""Fields of configurations whose attention sees only the keys that score best; whether the value is
a limit. They are of DeepSeek-V3.2, MiniMax-M3, Qwen4, and Doge, whose mask hides no later token
(transformers 5.17).
"""


def rotary_limits(config: Any) -> Iterator[tuple[str, int]]:
    """Yield the rotary types of a configuration that depend on the length, with their limits.

    A type is ``longrope`` or ``dynamic``, as `transformers.modeling_rope_utils.dynamic_rope_update`
    knows them.
    """
    stated = getattr(config, "rope_parameters", None) or {}
    # Some models have one rotation for each kind of layer.
    by_kind = [parameters for parameters in stated.values() if isinstance(parameters, dict)]
    for parameters in by_kind or [stated]:
        kind = str(parameters.get("rope_type", ""))
        if kind == "longrope":
            yield kind, int(parameters["original_max_position_embeddings"])
        elif "dynamic" in kind:
            yield "dynamic", int(config.max_position_embeddings)


def pass_kind(config: Any, length: int) -> Hashable:
    """Return a key that is equal for two lengths of rows that may share a pass."""
    kind: list[Hashable] = []
    for rotation, limit in rotary_limits(config):
        kind.append(length > limit if rotation == "longrope" else max(length, limit))
    for name, is_limit in _CHOSEN_KEYS.items():
        if (value := getattr(config, name, None)) is not None:
            kind.append(max(length, int(value) if is_limit else 0))
    return tuple(kind)


def steps_of_passes(config: Any, first: int, count: int) -> list[range]:
    """Return the steps of an answer as ranges that one pass serves; one range is the common case.

    Step i follows ``first + i`` tokens. The pass of a range is over all tokens before its last
    step.
    """
    if not pass_kind(config, first):  # nothing follows the length
        return [range(count)] if count else []
    kinds = [pass_kind(config, first + step) for step in range(count)]
    starts = [step for step in range(count) if not step or kinds[step] != kinds[step - 1]]
    return [range(*span) for span in pairwise([*starts, count])]


def check_one_kind(config: Any, shortest: int, longest: int) -> None:
    """Refuse rows that grow side by side with one KV cache, if they may not share a pass.

    Raises:
        ModelError: The shortest and the longest row are of different kinds.
    """
    if pass_kind(config, shortest) != pass_kind(config, longest):
        raise ModelError(
            f"rows of {shortest} to {longest} tokens side by side of a model whose numbers follow "
            f"the longest",
            wanted="rows on one side of the limit, or of one length",
            do="take shorter prompts and fewer new tokens, or another model",
        )


def check_cached(reference: str, output: Any) -> None:
    """Refuse the output of a pass that filled no cache: what follows would not see its tokens.

    Raises:
        ModelError: The architecture has no cache, as the first GPT or XLM.
    """
    if getattr(output, "past_key_values", None) is None:
        raise ModelError(
            f"{reference} keeps no keys and values of the tokens that it has read",
            wanted="an architecture that decodes with a cache",
            do="take another model, such as Llama, Qwen3 or Mistral",
        )
