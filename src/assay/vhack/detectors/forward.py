"""Hidden states and log-probabilities of completions from one forward pass over each batch.

Shapes: S samples, L layers, H width of the hidden state, M completion tokens of a batch, V ids of
the vocabulary.
"""

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from assay.models.decoder import decoder_layers, head_of
from assay.models.model import PreTrained
from assay.models.precision import wide_products
from assay.vhack.directions.gradients.batches import Encoded, SampleBatch, plan_batches

BATCH_TOKENS = {"cuda": 16384, "cpu": 1024}  # of one forward pass, padding included

# Hooks sit in the shared model, and verl pays rollouts in threads.
_hooks_lock = threading.Lock()


@torch.no_grad()
def forward_samples(
    module: PreTrained, encoded: Sequence[Encoded], layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return means over completion tokens: layer outputs [L, S, H], log-probabilities [S]."""
    budget = BATCH_TOKENS.get(module.device.type, 1024)
    states: dict[int, Tensor] = {}
    means: dict[int, Tensor] = {}
    logprobs: dict[int, Tensor] = {}
    with _hooks_lock, ExitStack() as stack, wide_products(module):
        stack.callback(module.train, module.training)
        module.train(False)
        for layer in layers:
            hook = partial(_keep_states, states, layer)
            stack.callback(decoder_layers(module)[layer].register_forward_hook(hook).remove)
        for part in plan_batches(encoded, budget, packed=False):
            batch = SampleBatch.build(part, module.device, packed=False)
            logprobs_M = _token_logprobs(module, batch)
            for row, (sample, (start, end)) in enumerate(
                zip(part, batch.label_segments.bounds, strict=True)
            ):
                # Padding stands to the right of the completion, so it changes no state in it.
                span = slice(*sample.completion)
                means_LH = [states[layer][row, span].float().mean(dim=0) for layer in layers]
                means[sample.index] = torch.stack([mean_H.to(module.device) for mean_H in means_LH])
                logprobs[sample.index] = logprobs_M[start:end].mean()
    order = range(len(encoded))
    means_LSH = torch.stack([means[index] for index in order], dim=1)
    return means_LSH, torch.stack([logprobs[index] for index in order])


def _keep_states(
    states: dict[int, Tensor], layer: int, _: Any, __: Any, output: Tensor | tuple[Tensor, ...]
) -> None:
    """Keep the output of a layer; some architectures return a tuple."""
    states[layer] = output if isinstance(output, Tensor) else output[0]


def _token_logprobs(module: PreTrained, batch: SampleBatch) -> Tensor:
    """Return the log-probability of each completion token of a batch, [M]."""

    def select_rows(_: object, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        states_BTH = arguments[0]
        rows = batch.label_rows.to(states_BTH.device)
        return (states_BTH.flatten(0, 1).index_select(0, rows)[None],)

    # Only rows that predict a completion token enter the head: with a large vocabulary, logits
    # take most of the memory.
    hook = head_of(module).register_forward_pre_hook(select_rows, prepend=True)
    try:
        logits_MV = module(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)
    finally:
        hook.remove()
    labels_M = batch.labels.to(logits_MV.device)
    return -cross_entropy(logits_MV.float(), labels_M, reduction="none")
