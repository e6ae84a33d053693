"""Rollouts of TRL as samples for a detector, and judged ones as new pairs."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from assay.models.chat import Chat, read_chat
from assay.vhack.pairs.pairs import Pair, Sample, text_of

_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which templates and engines keep what a policy thought before its answer."""


def as_sample(prompt: Any, completion: Any, **template_options: Any) -> Sample:
    """Return a rollout as a sample: all text, reasoning and tool calls of the policy."""
    if not isinstance(completion, str):
        parts = []
        for message in completion:
            # Answers of tools and users stand between the policy's messages.
            if message.get("role") == "assistant":
                parts += [message.get(field) for field in (*_REASONING, "content")]
                parts += [json.dumps(call) for call in message.get("tool_calls") or ()]
        completion = "\n".join(str(part) for part in parts if part)
    if isinstance(prompt, str):
        return Sample(prompt, completion)
    options: dict[str, Any] = {"chat_template_kwargs": template_options} if template_options else {}
    return Sample(read_chat(prompt, **options), completion)


def pair_judged(
    judged: Iterable[tuple[Sample, bool]], groups: Mapping[str | Chat, str]
) -> list[Pair]:
    """For every prompt with both, pair its latest cheating with its latest honest rollout.

    The group is that of the prompt, where it has one.
    """
    hacks: dict[str | Chat, str | Chat] = {}
    cleans: dict[str | Chat, str | Chat] = {}
    for sample, is_cheat in judged:
        if sample.prompt and sample.completion:
            side = hacks if is_cheat else cleans
            side[sample.prompt] = sample.completion
    return [
        Pair(prompt, hack, clean, groups.get(prompt, f"rollouts of {text_of(prompt)}"))
        for prompt, hack in hacks.items()
        if (clean := cleans.get(prompt)) is not None and clean != hack
    ]
