"""Inputs of detectors: texts, program facts, hidden states, log-probabilities, gradients.

States and log-probabilities come from one forward pass over each batch.

Shapes: S samples, F facts, L layers, H width of the hidden state, R coordinates of δS, M completion
tokens of a batch, V ids of the vocabulary.
"""

import math
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Flag, IntEnum
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from assay.errors import DataError, UsageError
from assay.models.decoder import decoder_layers, head_of
from assay.models.model import AnyModel, AnyTokenizer, PreTrained
from assay.models.precision import wide_products
from assay.vhack.detectors.facts import collect_facts
from assay.vhack.directions.gradients.batches import (
    Encoded,
    Progress,
    SampleBatch,
    plan_batches,
)
from assay.vhack.directions.gradients.per_sample import encode_samples, per_sample_gradients
from assay.vhack.directions.gradients.svd import SVDCache
from assay.vhack.directions.gradients.targets import module_of
from assay.vhack.pairs.pairs import Sample, text_of

# Layers whose states are kept, evenly spaced; a probe chooses among them.
MAX_LAYERS = 8
BATCH_TOKENS = {"cuda": 16384, "cpu": 1024}  # of one forward pass, padding included

# Hooks sit in the shared model, and verl pays rollouts in threads.
_hooks_lock = threading.Lock()

_Part = TypeVar("_Part")


class Cost(IntEnum):
    """Cost of scoring a sample: its text, a run, a forward pass, or a backward pass too."""

    TEXT, RUN, FORWARD, BACKWARD = range(4)


class Needs(Flag):
    """Parts of the evidence that a detector looks at."""

    TEXTS = 1
    ACTIVATIONS = 2
    LOGPROBS = 4
    GRADIENTS = 8
    FACTS = 16
    FORWARD = TEXTS | FACTS | ACTIVATIONS | LOGPROBS
    ALL = FORWARD | GRADIENTS

    @property
    def cost(self) -> Cost:
        """Cost of the dearest part."""
        if Needs.GRADIENTS in self:
            return Cost.BACKWARD
        if self & (Needs.ACTIVATIONS | Needs.LOGPROBS):
            return Cost.FORWARD
        return Cost.RUN if Needs.FACTS in self else Cost.TEXT


@dataclass(frozen=True, eq=False)
class SampleEvidence:
    """What detectors look at in S samples; a part that was not collected is None.

    Attributes:
        texts: Text of each completion.
        activations: Outputs of some layers, mean over the completion tokens, [L, S, H] float32.
        logprobs: Mean log-probability of a completion token, [S] float32.
        gradients: Gradients of δS by module, [S, R] each.
        facts: Facts of the programs in the completions, [S, F] float64.
    """

    texts: tuple[str, ...]
    activations: Tensor | None = None
    logprobs: Tensor | None = None
    gradients: Mapping[str, Tensor] | None = None
    facts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> "SampleEvidence":
        """Return the evidence of some of the samples."""
        index = torch.as_tensor(rows, dtype=torch.long)

        def some(part: Tensor | None, dim: int = 0) -> Tensor | None:
            return None if part is None else part.index_select(dim, index)

        return SampleEvidence(
            tuple(self.texts[row] for row in rows),
            activations=some(self.activations, 1),
            logprobs=some(self.logprobs),
            gradients=self.gradients
            and {name: rows_SR[index] for name, rows_SR in self.gradients.items()},
            facts=some(self.facts),
        )


@dataclass(frozen=True, eq=False)
class LabelledEvidence:
    """Evidence of samples that hack and of clean ones, and the group of each.

    Detectors along axes take the sides of pairs, in one order.
    """

    hack: SampleEvidence
    clean: SampleEvidence
    hack_groups: Sequence[str]
    clean_groups: Sequence[str]

    def rows(self, groups: Collection[str]) -> tuple[list[int], list[int]]:
        """Return the rows of hack and of clean samples that belong to these groups."""
        hack_rows = [row for row, group in enumerate(self.hack_groups) if group in groups]
        clean_rows = [row for row, group in enumerate(self.clean_groups) if group in groups]
        return hack_rows, clean_rows

    def without(self, groups: Collection[str]) -> "LabelledEvidence":
        """Return the evidence of all other groups.

        Raises:
            UsageError: No hack or no clean sample would be left to fit to.
        """
        hack_rows, clean_rows = self.rows({*self.hack_groups, *self.clean_groups} - set(groups))
        if not hack_rows or not clean_rows:
            raise UsageError(
                "all samples of a kind in a few groups",
                wanted="more groups",
                do="add samples of others",
            )
        return LabelledEvidence(
            self.hack.take(hack_rows),
            self.clean.take(clean_rows),
            [self.hack_groups[row] for row in hack_rows],
            [self.clean_groups[row] for row in clean_rows],
        )


def collected(part: _Part | None) -> _Part:
    """Return a part of evidence, or refuse evidence that lacks it."""
    if part is None:
        raise UsageError(
            "evidence without a part that the detector needs",
            wanted="all parts in its `needs`",
            do="collect evidence with the detector's `needs`",
        )
    return part


def collect_evidence(
    samples: Sequence[Sample],
    model: AnyModel,
    *,
    needs: Needs = Needs.ALL,
    gradients: Mapping[str, Tensor] | None = None,
    tokenizer: AnyTokenizer = None,
    svd: SVDCache | None = None,
    progress: Progress | None = None,
) -> SampleEvidence:
    """Return the parts of evidence that a detector needs.

    Args:
        samples: Prompts with their completions.
        model: Model whose passes are looked at.
        needs: Parts to collect; texts are always there.
        gradients: Gradients of the samples, where they were computed already.
        tokenizer: Tokenizer, as for :func:`assay.vhack.per_sample_gradients`, which also says
            what is raised.
        svd: Factors of all weights; None computes them.
        progress: Function called with the number of gradients done and of all.

    Raises:
        DataError: A text has no UTF-8 form.
    """
    texts = tuple(text_of(sample.completion) for sample in samples)
    for index, sample in enumerate(samples):
        try:
            (text_of(sample.prompt) + texts[index]).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"sample {index}: {error.reason}",
                wanted="text that UTF-8 can encode",
                do="remove lone surrogates",
            ) from error
    evidence = SampleEvidence(texts, gradients=gradients)
    if Needs.FACTS in needs:
        evidence = replace(evidence, facts=collect_facts(samples))
    if needs & (Needs.ACTIVATIONS | Needs.LOGPROBS):
        module = module_of(model)
        encoded = encode_samples(samples, model, tokenizer=tokenizer)
        layers = spaced_layers(len(decoder_layers(module)))
        activations_LSH, logprobs_S = forward_samples(module, encoded, layers)
        evidence = replace(evidence, activations=activations_LSH.cpu(), logprobs=logprobs_S.cpu())
    if Needs.GRADIENTS in needs and gradients is None:
        computed = per_sample_gradients(
            samples, model, tokenizer=tokenizer, svd=svd, progress=progress
        )
        # peft renames the weights that it wraps, and axes know the names from before.
        by_module = {name.removesuffix(".base_layer"): rows for name, rows in computed.items()}
        evidence = replace(evidence, gradients=by_module)
    return evidence


def spaced_layers(count: int) -> list[int]:
    """Return at most ``MAX_LAYERS`` of so many layers, evenly spaced, the last one included."""
    parts = range(1, MAX_LAYERS + 1)
    return sorted({math.ceil(count * part / MAX_LAYERS) - 1 for part in parts})


@torch.no_grad()
def forward_samples(
    module: PreTrained, encoded: Sequence[Encoded], layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return means over completion tokens: layer outputs [L, S, H], log-probabilities [S].

    A number that is not finite is a DataError.
    """
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
        for part in plan_batches(encoded, budget, module, packed=False):
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
    logprobs_S = torch.stack([logprobs[index] for index in order])
    # A score that is NaN would be above no threshold.
    is_finite_S = means_LSH.isfinite().all(dim=2).all(dim=0) & logprobs_S.isfinite()
    for sample, is_finite in zip(encoded, is_finite_S.tolist(), strict=True):
        if not is_finite:
            raise DataError(
                f"a state or the log-probability of {sample.name} is not finite",
                wanted="finite numbers",
                do="leave the sample out, or load the model in bfloat16 or float32",
            )
    return means_LSH, logprobs_S


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
