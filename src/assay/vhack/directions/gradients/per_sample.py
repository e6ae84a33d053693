"""The δS gradient of every sample, at δS = 0, of every target: one pass per batch.

The pass of a model that is whole on one device runs on copies (:class:`Replica`), that of a divided
one on the model itself (:class:`DividedPass`).

Shapes: N rows of all tokens, M rows that predict a completion token, B samples.
"""

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from assay.errors import DataError, ModelError, OutOfMemory, UsageError, is_out_of_memory
from assay.models.decoder import has_hooks
from assay.models.device import free_bytes, one_thread
from assay.models.model import AnyModel, AnyTokenizer, Model, PreTrained
from assay.vhack.directions.gradients.batches import (
    Encoded,
    Progress,
    context_length,
    encode,
    plan_batches,
    room_for_batches,
    token_budget,
)
from assay.vhack.directions.gradients.divided_pass import DividedPass
from assay.vhack.directions.gradients.division import Division, division_of
from assay.vhack.directions.gradients.replica import Computed, Replica, recipe_for
from assay.vhack.directions.gradients.svd import Factors, SVDCache, factors_of, weight_svd
from assay.vhack.directions.gradients.taps import exact_factors
from assay.vhack.directions.gradients.targets import chosen_modules, module_of, target_modules
from assay.vhack.pairs.pairs import Sample


class SampleGradients(dict[str, Tensor]):
    """The δS gradients of N samples, [N, R] float32 on the CPU per module name.

    Attributes:
        tokens: Number of tokens of each sample that came to each of E experts, [N, E] per module of
            experts; padding is not counted.
    """

    def __init__(self, gradients: Mapping[str, Tensor]) -> None:
        super().__init__(gradients)
        self.tokens: dict[str, Tensor] = {}


def encode_samples(
    samples: Sequence[Sample],
    model: AnyModel,
    names: Sequence[str] | None = None,
    tokenizer: AnyTokenizer = None,
) -> list[Encoded]:
    """Tokenise samples for a model, and refuse by name or number what :func:`encode` refuses."""
    if names is None:
        names = [f"sample {index}" for index in range(len(samples))]
    if tokenizer is None and isinstance(model, Model):
        tokenizer = model.tokenizer
    module = module_of(model)
    embeddings: Any = module.get_input_embeddings()
    return encode(tokenizer, samples, names, context_length(module), len(embeddings.weight))


def per_sample_gradients(
    samples: Sequence[Sample],
    model: AnyModel,
    *,
    tokenizer: AnyTokenizer = None,
    svd: SVDCache | None = None,
    modules: Collection[str] | None = None,
    max_tokens: int | None = None,
    checkpointing: bool = False,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> SampleGradients:
    """Return the exact δS gradient of the loss of each sample, from one backward pass per batch.

    The loss of a sample is the mean negative log-likelihood of its completion tokens. A copy of the
    model that shares its weights runs in evaluation mode; the model itself is not touched. On a
    CPU, batches run side by side, one per core. A divided model runs itself; processes that share
    its weights call this together with the same samples, and all return the gradients.

    Args:
        samples: Prompts and completions.
        model: Model in float32 or bfloat16.
        tokenizer: Tokenizer of the model; None takes the one that was loaded with a
            :class:`assay.models.Model`. It adds no special tokens: a model that needs ``<bos>``
            must have it in the text of the prompt.
        svd: Factors of the weights from :func:`weight_svd`; None computes them.
        modules: Names of the target modules whose gradients are wanted; None stands for all.
        max_tokens: Largest number of tokens in a batch, padding included; None chooses from the
            free memory. A batch that still runs out of memory is split, unless processes share
            the weights.
        checkpointing: Whether to recompute each layer in the backward pass: a third more time for
            far less memory.
        names: Name of each sample in errors; None numbers them.
        progress: Function called with the number of samples done and of all.

    Returns:
        Per module name, [N, R] float32 on the CPU, rows in the order of the samples; of experts
        also their tokens.

    Raises:
        UsageError: There are no samples or no tokenizer, ``max_tokens`` is below 1, the factors
            belong to other modules, or a module is no target.
        DataError: A prompt or completion is empty, a sample is too long, its loss or gradient is
            not finite, or processes pass other samples.
        ModelError: The model has no target projections, has experts of an unknown form, is float16,
            or is divided in a way in which no weight can be had whole.
        OutOfMemory: Not even one sample fits, or a batch of processes that share the weights.

    Example:
        >>> from assay.models import load_model
        >>> from assay.vhack import Sample, per_sample_gradients
        >>> model = load_model("reference:llama", device="cpu")
        >>> found = per_sample_gradients([Sample("2 + 2 =", " 4")], model)
        >>> found["model.layers.0.self_attn.q_proj"].shape
        torch.Size([1, 256])
    """
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(
            f"max_tokens={max_tokens}", wanted="at least 1", do="set it higher, or leave it out"
        )
    module = module_of(model)
    targets = chosen_modules(module, modules)
    if module.dtype not in (torch.float32, torch.bfloat16):
        raise ModelError(
            f"a model in {module.dtype}",
            wanted="float32 or bfloat16, in which small gradients do not vanish",
            do="load it with another dtype",
        )
    encoded = encode_samples(samples, model, names, tokenizer)
    svd = svd if svd is not None else weight_svd(module, modules=modules)
    division = division_of(module)
    limit = svd.rank or sys.maxsize  # of factors that other processes have
    own_targets = targets
    if division is not None:
        own_names = set(division.own(list(target_modules(module))))
        own_targets = {name: targets[name] for name in targets if name in own_names}
    factors = factors_of(own_targets, svd)
    lengths = {
        name: factors[name].rank if name in factors else min(*linear.weight.shape, limit)
        for name, linear in targets.items()
    }
    if division is None:
        replicas, batches = _replicas(module, targets, factors, encoded, max_tokens, checkpointing)
    else:
        batches = _divided_batches(module, division, encoded, max_tokens, checkpointing)
        replicas = [DividedPass(module, targets, factors, lengths, division, checkpointing)]
    gradients = SampleGradients(
        {
            name: torch.zeros(len(samples), length, dtype=torch.float32)
            for name, length in lengths.items()
        }
    )
    finished = 0
    with _side_by_side(replicas, batches) as results:
        for computed in results:
            _store(gradients, computed)
            if not all(
                bool(part.isfinite().all()) for part in (computed.together, computed.losses)
            ):
                check_finite(gradients, computed.batch.encoded)
            finished += len(computed.batch.encoded)
            if progress:
                progress(finished, len(samples))
    return gradients


def _replicas(
    module: PreTrained,
    targets: Mapping[str, nn.Linear],
    factors: Mapping[str, Factors],
    encoded: list[Encoded],
    max_tokens: int | None,
    checkpointing: bool,
) -> tuple[Sequence[Replica | DividedPass], list[list[Encoded]]]:
    """Return copies of a whole model that run side by side, and the batches for them."""
    recipe = recipe_for(module)
    at_once = batches_at_once(module)
    room = room_for_batches(free_bytes(module.device), module.device.type) / at_once
    budget = max_tokens or token_budget(module, encoded, room, checkpointing=checkpointing)
    if at_once > 1:  # a batch for each
        budget = min(budget, -(-sum(len(sample.ids) for sample in encoded) // at_once))
    batches = plan_batches(encoded, budget, module, packed=recipe.packed)
    factored = exact_factors(targets, factors) if recipe.factored else set()
    replica = partial(
        Replica, module, factors, recipe, factored=factored, checkpointing=checkpointing
    )
    return [replica() for _ in range(min(at_once, len(batches)))], batches


def _divided_batches(
    module: PreTrained,
    division: Division,
    encoded: list[Encoded],
    max_tokens: int | None,
    checkpointing: bool,
) -> list[list[Encoded]]:
    """Return the batches of a divided model, those of every process."""
    division.check_same([(sample.ids, sample.n_prompt) for sample in encoded])
    # All logits are computed, not those of completions alone.
    all_tokens = [replace(sample, n_prompt=0) for sample in encoded]
    free = min(division.gather(min(map(free_bytes, division.devices))))
    room = room_for_batches(free, division.device.type)
    budget = max_tokens or token_budget(module, all_tokens, room, checkpointing=checkpointing)
    return plan_batches(encoded, budget, module, packed=False)


def batches_at_once(module: PreTrained) -> int:
    """Return the number of concurrent batches: one where hooks may keep state between calls."""
    alone = module.device.type != "cpu" or any(map(has_hooks, module.modules()))
    return 1 if alone else torch.get_num_threads()


@contextmanager
def _side_by_side(
    replicas: Sequence[Replica | DividedPass], batches: list[list[Encoded]]
) -> Iterator[Iterator[Computed]]:
    """Yield the gradients of every batch, in any order.

    Several replicas run at once, each in one thread: two batches side by side take less time than
    one after the other with every small operation shared between two threads. One replica, on a
    GPU, is always one batch ahead.
    """
    if len(replicas) == 1:
        yield _one_ahead(computed for batch in batches for computed in _attempt(replicas[0], batch))
        return
    free: SimpleQueue[Replica | DividedPass] = SimpleQueue()
    for replica in replicas:
        free.put(replica)

    def work(batch: list[Encoded]) -> list[Computed]:
        replica = free.get()
        try:
            return _attempt(replica, batch)
        finally:
            free.put(replica)

    pool = ThreadPoolExecutor(len(replicas))
    with one_thread():
        try:
            waiting = [pool.submit(work, batch) for batch in batches]
            yield (batch for future in as_completed(waiting) for batch in future.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _one_ahead(items: Iterator[Computed]) -> Iterator[Computed]:
    """Yield item n once item n + 1 is launched, so that the GPU is one batch ahead.

    249 samples of Qwen3-0.6B's shape took an H200 7.2 s at a commit with this and the gather of
    attention (:mod:`.packed`), and 7.8 s at one without, beside other work.
    """
    before = next(items)
    for item in items:
        yield before
        before = item
    yield before


def _attempt(replica: Replica | DividedPass, batch: list[Encoded]) -> list[Computed]:
    """Return the gradients of a batch, in halves if it does not fit into one process."""
    try:
        return [replica.gradients(batch)]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # The others, where it may fit, would wait for the rest of this very batch.
        if isinstance(replica, DividedPass) and replica.division.group is not None:
            raise OutOfMemory(
                f"{len(batch)} samples in one batch do not fit into a process: {error}",
                wanted="room for a batch in every process that shares the model",
                do="set max_tokens lower, turn checkpointing on, or use bfloat16",
            ) from error
        if len(batch) == 1:
            raise OutOfMemory(
                f"{batch[0].name} with {len(batch[0].ids)} tokens does not fit: {error}",
                wanted="room for one sample",
                do="turn checkpointing on, use bfloat16, or leave the sample out",
            ) from error
    # Outside the except block: inside, the exception keeps the memory of the failed attempt.
    middle = len(batch) // 2
    return [
        computed
        for half in (batch[:middle], batch[middle:])
        for computed in _attempt(replica, half)
    ]


def check_finite(gradients: SampleGradients, encoded: list[Encoded]) -> None:
    """Raise a DataError for the first of these samples with a number that is not finite."""
    # NaN and infinities are among the least or the largest numbers of a row.
    fine_MN = [
        torch.stack(torch.aminmax(rows_NR, dim=1)).isfinite().all(dim=0)
        for rows_NR in gradients.values()
    ]
    for sample in encoded if not torch.stack(fine_MN).all() else ():
        for name, fine_N in zip(gradients, fine_MN, strict=True):
            if not fine_N[sample.index]:
                raise DataError(
                    f"the loss or the gradient of {sample.name} in {name} is not finite",
                    wanted="finite numbers",
                    do="leave the sample out, or load the model in float32",
                )


def _store(gradients: SampleGradients, computed: Computed) -> None:
    """Write the gradients of a batch into their rows; a loss that is not finite makes its row
    NaN.
    """
    batch, together_BR, losses_M, arrived, tokens = computed
    if arrived is not None:
        arrived.synchronize()
    index = torch.tensor([sample.index for sample in batch.encoded])
    by_module = torch.split(
        together_BR, [rows_NR.shape[1] for rows_NR in gradients.values()], dim=1
    )
    for rows_NR, part_BR in zip(gradients.values(), by_module, strict=True):
        rows_NR[index] = part_BR
    for name, tokens_BE in tokens.items():
        empty_NE = tokens_BE.new_zeros(len(next(iter(gradients.values()))), tokens_BE.shape[1])
        gradients.tokens.setdefault(name, empty_NE)[index] = tokens_BE
    for sample, (start, end) in zip(batch.encoded, batch.label_segments.bounds, strict=True):
        if not torch.isfinite(losses_M[start:end]).all():
            next(iter(gradients.values()))[sample.index] = torch.nan
