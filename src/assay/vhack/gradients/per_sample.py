"""The gradient of every sample with respect to δS, at δS = 0, of every target module."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from assay.errors import DataError, ModelError, OutOfMemory, UsageError, is_out_of_memory
from assay.models.decoder import has_hooks
from assay.models.device import free_bytes, one_thread
from assay.models.load import Model
from assay.vhack.gradients.batches import (
    Encoded,
    context_length,
    count_layers,
    encode,
    plan_batches,
    plan_in_turns,
    room_for_batches,
    token_budget,
)
from assay.vhack.gradients.division import Division, division_of
from assay.vhack.gradients.progress import Progress
from assay.vhack.gradients.replica import Computed, Replica, recipe_for
from assay.vhack.gradients.svd import Factors, SVDCache, weight_svd
from assay.vhack.gradients.taps import exact_factors
from assay.vhack.gradients.targets import chosen_modules, module_of
from assay.vhack.pairs.pairs import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SampleGradients(dict[str, Tensor]):
    """The δS gradients of N samples, [N, R] float32 on the CPU per module name.

    Attributes:
        tokens: Number of tokens of each sample that came to each of E experts, [N, E] per module of experts; padding
            is not counted.
    """

    def __init__(self, gradients: Mapping[str, Tensor]) -> None:
        super().__init__(gradients)
        self.tokens: dict[str, Tensor] = {}


def per_sample_gradients(
    samples: Sequence[Sample],
    model: "Model | PreTrainedModel",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    svd: SVDCache | None = None,
    modules: Collection[str] | None = None,
    max_tokens: int | None = None,
    checkpointing: bool = False,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> SampleGradients:
    """Return the exact δS gradient of the loss of each sample, from one backward pass per batch.

    The loss of a sample is the mean negative log-likelihood of its completion tokens. A copy of the model that
    shares its weights runs in evaluation mode; the model itself is not touched. On a CPU, batches run side by side,
    one per core.

    A model in parts (``fully_shard``, ``parallelize_module``, ``device_map`` over several devices) runs itself, and is
    as it was afterwards. Where several processes have parts, all of them must call this with the same samples, and each
    gets all gradients.

    Args:
        samples: Prompts and completions.
        model: Model in float32 or bfloat16.
        tokenizer: Tokenizer of the model; None takes the one that was loaded with a :class:`assay.models.Model`. It
            adds no special tokens: a model that needs ``<bos>`` must have it in the text of the prompt.
        svd: Factors of the weights from :func:`weight_svd`; None computes them.
        modules: Names of the target modules whose gradients are wanted; None stands for all.
        max_tokens: Largest number of tokens in a batch, padding included; None chooses from the free memory. A batch
            that still runs out of memory is split.
        checkpointing: Whether to recompute each layer in the backward pass: a third more time for far less memory.
            Under FSDP2, where every batch gathers all weights, some are recomputed anyway if that makes fewer batches.
        names: Name of each sample in errors; None numbers them.
        progress: Function called with the number of samples done and of all.

    Returns:
        Per module name, [N, R] float32 on the CPU, rows in the order of the samples; of experts also their tokens.

    Raises:
        UsageError: There are no samples or no tokenizer, ``max_tokens`` is below 1, the factors belong to other
            modules, a module is no target, or processes have other samples than this one.
        DataError: A prompt or completion is empty, a sample is too long, or its loss or gradient is not finite.
        ModelError: The model has no target projections, has experts of an unknown form, is float16, or is in parts of
            which gradients would not be exact.
        OutOfMemory: Not even one sample fits.

    Example:
        >>> from assay.models import load_model
        >>> from assay.vhack import Sample, per_sample_gradients
        >>> model = load_model("reference:llama", device="cpu")
        >>> found = per_sample_gradients([Sample("2 + 2 =", " 4")], model)
        >>> found["model.layers.0.self_attn.q_proj"].shape
        torch.Size([1, 256])
    """
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens={max_tokens}", wanted="at least 1", do="set it higher, or leave it out")
    module = module_of(model)
    wanted = chosen_modules(module, modules)
    _check_dtype(module)
    labels = [f"sample {index}" for index in range(len(samples))] if names is None else list(names)
    if tokenizer is None and isinstance(model, Model):
        tokenizer = model.tokenizer
    encoded = encode(tokenizer, samples, labels, context_length(module))
    given = svd if svd is not None else weight_svd(module, modules=modules)
    _check_factors(wanted, given)
    factors = {name: given[name] for name in wanted}
    division = division_of(module, wanted)
    if division is not None:
        return _in_parts(module, factors, division, encoded, max_tokens, checkpointing, progress)
    recipe = recipe_for(module)
    cores = _at_once(module)
    recomputed = count_layers(module) if checkpointing else 0
    room = room_for_batches(free_bytes(module.device)) / cores
    budget = max_tokens or token_budget(module, encoded, room, recomputed=recomputed)
    batches = plan_batches(encoded, budget, packed=recipe.packed, equal_lengths=recipe.equal_lengths, at_once=cores)
    found = SampleGradients({name: torch.empty(len(samples), factors[name].rank) for name in factors})
    factored = exact_factors(wanted, factors) if recipe.factored else set()
    replica = partial(Replica, module, factors, recipe, factored=factored, recomputed=recomputed)
    replicas = [replica() for _ in range(min(cores, len(batches)))]
    done = 0
    with _computed(replicas, batches) as results:
        for computed in results:
            _store(found, computed)
            if not (torch.isfinite(computed.together).all() and torch.isfinite(computed.losses).all()):
                check_finite(found, computed.batch.encoded)
            done += len(computed.batch.encoded)
            if progress:
                progress(done, len(samples))
    return found


def _at_once(module: "PreTrainedModel") -> int:
    """Return how many batches run side by side: one where a user's hooks may keep something between calls."""
    hooked = any(has_hooks(part) for part in module.modules())
    return torch.get_num_threads() if module.device.type == "cpu" and not hooked else 1


@contextmanager
def _computed(replicas: list[Replica], batches: list[list[Encoded]]) -> Iterator[Iterator[Computed]]:
    """Yield the gradients of every batch, in any order.

    Several replicas run at once, each in one thread: two batches side by side take less time than one after the other
    with every small operation shared between two threads. One replica, on a GPU, is always one batch ahead.
    """
    if len(replicas) == 1:
        yield _one_ahead(computed for batch in batches for computed in _attempt(replicas[0], batch))
        return
    free: SimpleQueue[Replica] = SimpleQueue()
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
            yield (computed for future in as_completed(waiting) for computed in future.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _one_ahead(items: Iterator[Computed]) -> Iterator[Computed]:
    """Yield item n after item n + 1 has been launched, so that the GPU is always one batch ahead."""
    before = next(items)
    for item in items:
        yield before
        before = item
    yield before


def _attempt(replica: Replica, batch: list[Encoded]) -> list[Computed]:
    """Return the gradients of a batch, in parts if it does not fit into memory."""
    try:
        return [replica.gradients(batch)]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        halves = _halves(batch, str(error))
    # Outside the except block: inside, the exception keeps the memory of the failed attempt.
    return [done for half in halves for done in _attempt(replica, half)]


def _in_parts(
    module: "PreTrainedModel",
    factors: Mapping[str, Factors],
    division: Division,
    encoded: list[Encoded],
    max_tokens: int | None,
    checkpointing: bool,
    progress: Progress | None,
) -> SampleGradients:
    """Return the gradients of all samples of a model in parts, in every process."""
    found = SampleGradients({name: torch.zeros(len(encoded), each.rank) for name, each in factors.items()})
    free = _agreed(division, (encoded, max_tokens, checkpointing), free_bytes(next(module.parameters()).device))
    recipe = recipe_for(module, division)
    takers = division.processes if division.by_samples else 1
    how = {"packed": recipe.packed, "equal_lengths": recipe.equal_lengths}
    if takers > 1 and max_tokens is None:
        batches, recomputed = plan_in_turns(module, encoded, free, at_once=takers, checkpointing=checkpointing, **how)
    else:
        recomputed = count_layers(module) if checkpointing else 0
        budget = max_tokens or token_budget(module, encoded, room_for_batches(free), recomputed=recomputed)
        batches = plan_batches(encoded, budget, at_once=takers, **how)
    with ExitStack() as undo:
        replica = Replica(module, factors, recipe, recomputed=recomputed, division=division, undo=undo)
        for start in range(0, len(batches), takers):
            turn = batches[start : start + takers]
            mine = division.rank if takers > 1 else 0
            # FSDP2 gathers weights in all processes at once: one with nothing to do repeats a batch for the others.
            computed = _unsplit(replica, turn[mine] if mine < len(turn) else turn[0])
            if mine < len(turn):
                _store(found, computed)
            if progress:
                progress(sum(len(batch) for batch in batches[: start + len(turn)]), len(encoded))
    division.add_up(found.values())
    check_finite(found, encoded)
    return found


def check_finite(found: SampleGradients, encoded: list[Encoded]) -> None:
    """Refuse the first of these samples with a row that is not finite, by one look at every module.

    Raises:
        DataError: There is one; the message names it.
    """
    # NaN and infinities are among the least or the largest numbers of a row.
    fine_MN = [torch.stack(torch.aminmax(rows_NR, dim=1)).isfinite().all(dim=0) for rows_NR in found.values()]
    for one in encoded if not torch.stack(fine_MN).all() else ():
        if bad := next((name for name, fine_N in zip(found, fine_MN, strict=True) if not fine_N[one.index]), ""):
            raise DataError(
                f"the loss or the gradient of {one.name} in {bad} is not finite",
                wanted="finite numbers",
                do="leave the sample out, or load the model in float32",
            )


def _agreed(division: Division, given: tuple[list[Encoded], int | None, bool], free: float) -> float:
    """Return the fewest bytes that are free in a process, after a look at whether all of them were given the same."""
    encoded, *settings = given
    ids = hashlib.sha256(repr(([(one.ids, one.n_prompt) for one in encoded], settings)).encode()).hexdigest()
    told = division.gathered((ids, free))
    if len({theirs for theirs, _ in told}) > 1:
        raise UsageError(
            f"other samples in process {division.rank} than in others, or other settings",
            wanted="the same samples in the same order in every process, which share them out themselves",
            do="pass all of them everywhere, with the same max_tokens and checkpointing",
        )
    return min(float(theirs) for _, theirs in told)


def _unsplit(replica: Replica, batch: list[Encoded]) -> Computed:
    """Return the gradients of a batch that cannot be split: the other processes would not know."""
    try:
        return replica.gradients(batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"{len(batch)} samples do not fit beside the parts of the model: {error}",
            wanted="room for a batch in every process",
            do="set max_tokens lower, turn checkpointing on, or use more processes",
        ) from error


def _store(found: SampleGradients, computed: Computed) -> None:
    """Put the gradients of a batch into their rows; a loss that is not finite leaves no finite row."""
    batch, together_BR, losses_M, arrived, tokens = computed
    if arrived is not None:
        arrived.synchronize()
    index = torch.tensor([one.index for one in batch.encoded])
    by_module = torch.split(together_BR, [rows_NR.shape[1] for rows_NR in found.values()], dim=1)
    for rows_NR, part_BR in zip(found.values(), by_module, strict=True):
        rows_NR[index] = part_BR
    for name, tokens_BE in tokens.items():
        empty_NE = tokens_BE.new_zeros(len(next(iter(found.values()))), tokens_BE.shape[1])
        found.tokens.setdefault(name, empty_NE)[index] = tokens_BE
    for one, (start, end) in zip(batch.encoded, batch.label_segments.bounds, strict=True):
        if not torch.isfinite(losses_M[start:end]).all():
            next(iter(found.values()))[one.index] = torch.nan


def _halves(batch: list[Encoded], error: str) -> list[list[Encoded]]:
    if len(batch) > 1:
        middle = len(batch) // 2
        return [batch[:middle], batch[middle:]]
    raise OutOfMemory(
        f"{batch[0].name} with {len(batch[0].ids)} tokens does not fit: {error}",
        wanted="room for one sample",
        do="turn checkpointing on, use bfloat16, or leave the sample out",
    )


def _check_dtype(module: "PreTrainedModel") -> None:
    if module.dtype not in (torch.float32, torch.bfloat16):
        raise ModelError(
            f"a model in {module.dtype}",
            wanted="float32 or bfloat16, in which small gradients do not vanish",
            do="load it with another dtype",
        )


def _check_factors(modules: Mapping[str, nn.Linear], factors: Mapping[str, Factors]) -> None:
    for name, module in modules.items():
        if name not in factors or (factors[name].left.shape[0], factors[name].right.shape[1]) != module.weight.shape:
            raise UsageError(
                f"no factors of {name}, {list(module.weight.shape)}",
                wanted="factors of every target module",
                do="compute them with weight_svd of this very model",
            )
