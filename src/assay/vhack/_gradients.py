"""per_sample_gradients: the gradient of every sample with respect to δS, at δS = 0, of every target module."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from assay.errors import DataError, ModelError, OutOfMemory, UsageError
from assay.models import decoder_layers
from assay.vhack._batches import Batch, Encoded, encode, plan, token_budget
from assay.vhack._digest import module_of
from assay.vhack._svd_cache import SVDCache, weight_svd
from assay.vhack._taps import taps
from assay.vhack._targets import target_modules
from assay.vhack._types import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from assay.models import Model

__all__ = ["per_sample_gradients"]

Progress = Callable[[int, int], None]


def per_sample_gradients(
    model: "Model | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    samples: Sequence[Sample],
    *,
    svd: SVDCache | None = None,
    max_tokens: int | None = None,
    checkpointing: bool = False,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The δS gradient of each sample's loss, exact, from one backward pass per batch of the unmodified model.

    The loss of a sample is the mean negative log-likelihood of its completion tokens. The model is run in evaluation
    mode with frozen weights, and is left as it was: weights, their gradients, ``requires_grad``, modes and hooks.

    Args:
        model: a float32 or bfloat16 model.
        tokenizer: its tokenizer; no special tokens are added.
        samples: prompts and completions.
        svd: factors of the weights from :func:`weight_svd`; None computes them.
        max_tokens: most tokens in a batch, padding included; None chooses from the free memory. A batch that still
            runs out of memory on a GPU is split.
        checkpointing: recompute each layer in the backward pass: a third more time for far less memory.
        names: what to call each sample in an error; None numbers them.
        progress: called with samples done and all.

    Returns:
        Per module name, [N, R] float32 on the CPU, rows in the order of the samples.

    Raises:
        UsageError: there are no samples or no tokenizer, or the factors belong to other modules.
        DataError: a prompt or completion is empty, a sample is too long, or its loss or gradient is not finite.
        ModelError: the model has no target projections, has fused experts, or is float16.
        OutOfMemory: not even one sample fits.
    """
    module = module_of(model)
    modules = target_modules(module)
    _check_dtype(module)
    labels = [f"sample {index}" for index in range(len(samples))] if names is None else list(names)
    encoded = encode(tokenizer, samples, labels, int(module.config.get_text_config().max_position_embeddings))
    factors = svd if svd is not None else weight_svd(module)
    _check_factors(modules, factors)
    budget = max_tokens or token_budget(module, encoded, checkpointing=checkpointing)
    queue = plan(encoded, budget)
    done = 0
    with _frozen(module, checkpointing), taps(modules, factors, checkpointing=checkpointing) as rows:
        found = {name: torch.empty(len(samples), factors[name].rank) for name in modules}
        while queue:
            batch = queue.pop(0)
            try:
                together = _run(module, Batch.build(batch, module.device), rows, list(found))
            except torch.OutOfMemoryError as error:
                queue[:0] = _halves(batch, error)
                continue
            _store(found, together, batch)
            done += len(batch)
            if progress:
                progress(done, len(samples))
    return found


def _run(module: "PreTrainedModel", batch: Batch, rows: dict[str, Tensor], order: Sequence[str]) -> Tensor:
    """One forward and backward pass; the gradients of all modules side by side, [B, ΣR] on the CPU."""
    rows.clear()
    with _only_completions(module, batch):
        logits_MV = module(input_ids=batch.ids, use_cache=False).logits[0]
    losses_M = functional.cross_entropy(logits_MV.float(), batch.target, reduction="none")
    del logits_MV
    (losses_M * batch.weight).sum().backward()  # type: ignore[no-untyped-call]
    _check_losses(losses_M.detach(), batch)  # after the backward pass is on its way, for it waits for the device
    return torch.cat([rows[name] for name in order], dim=1).cpu()


@contextmanager
def _only_completions(module: "PreTrainedModel", batch: Batch) -> Iterator[None]:
    """Let the head see only the hidden states that predict a completion token, [1, M, hidden].

    With a large vocabulary the head takes most of the memory. Whatever the model does with the logits afterwards
    (scaling, capping) still happens.
    """
    head = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Module):
        raise ModelError(f"{type(module).__name__} has no head", wanted="a causal language model", do="use another")

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (arguments[0][batch.row, batch.column][None],)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _frozen(module: "PreTrainedModel", checkpointing: bool) -> Iterator[None]:
    """Evaluation mode, no gradients of weights, each layer recomputed if wanted; all put back as it was."""
    required = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    training = [(part, part.training) for part in module.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.callback(_restore, required, training)
        module.eval()  # type: ignore[no-untyped-call]
        for parameter, _ in required:
            parameter.requires_grad_(False)
        if checkpointing:
            for layer in decoder_layers(module):
                stack.callback(_recompute(layer))
        yield


def _restore(required: list[tuple[nn.Parameter, bool]], training: list[tuple[nn.Module, bool]]) -> None:
    for parameter, flag in required:
        parameter.requires_grad_(flag)
    for part, flag in training:
        part.training = flag


def _recompute(layer: nn.Module) -> Callable[[], None]:
    """Run the layer under checkpointing; returns what undoes it."""
    own = vars(layer).get("forward")
    plain: Any = layer.forward
    # The first layer's input requires no gradient, which only the newer kind of checkpointing allows.
    layer.forward = lambda *args, **kwargs: checkpoint(plain, *args, use_reentrant=False, **kwargs)

    def undo() -> None:
        if own is None:
            del layer.forward
        else:
            layer.forward = own

    return undo


def _store(found: dict[str, Tensor], together: Tensor, batch: list[Encoded]) -> None:
    index = torch.tensor([one.index for one in batch])
    parts = torch.split(together, [rows.shape[1] for rows in found.values()], dim=1)
    for rows_NR, part_BR in zip(found.values(), parts, strict=True):
        rows_NR[index] = part_BR
    finite_B = torch.isfinite(together).all(dim=1)
    if not finite_B.all():
        at = int((~finite_B).nonzero()[0])
        where = next(name for name, part in zip(found, parts, strict=True) if not torch.isfinite(part[at]).all())
        raise _not_finite(f"the gradient of {batch[at].name} in {where}")


def _check_losses(losses_M: Tensor, batch: Batch) -> None:
    finite_M = torch.isfinite(losses_M)
    if not finite_M.all():
        raise _not_finite(f"the loss of {batch.encoded[int(batch.row[~finite_M][0])].name}")


def _not_finite(what: str) -> DataError:
    return DataError(
        f"{what} is not finite", wanted="finite numbers", do="leave the sample out, or load the model in float32"
    )


def _halves(batch: list[Encoded], error: torch.OutOfMemoryError) -> list[list[Encoded]]:
    if len(batch) > 1:
        middle = len(batch) // 2
        return [batch[:middle], batch[middle:]]
    raise OutOfMemory(
        f"{batch[0].name} with {len(batch[0].ids)} tokens does not fit: {error}",
        wanted="room for one sample",
        do="turn checkpointing on, use bfloat16, or leave the sample out",
    ) from error


def _check_dtype(module: "PreTrainedModel") -> None:
    if module.dtype not in (torch.float32, torch.bfloat16):
        raise ModelError(
            f"a model in {module.dtype}",
            wanted="float32 or bfloat16, in which small gradients do not vanish",
            do="load it with another dtype",
        )


def _check_factors(modules: dict[str, nn.Linear], factors: SVDCache) -> None:
    for name, module in modules.items():
        if name not in factors or (factors[name].left.shape[0], factors[name].right.shape[1]) != module.weight.shape:
            raise UsageError(
                f"no factors of {name}, {list(module.weight.shape)}",
                wanted="factors of every target module",
                do="compute them with weight_svd of this very model",
            )
