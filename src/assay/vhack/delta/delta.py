"""DeltaS: the adapter ``W + U diag(δS) Vh`` around the projections of any transformers model.

- *Merged mode*: after every optimizer step the weights become ``W + U diag(δS) Vh``, always from the stored W. Forward
  passes and generation run on plain weights. A hook on each projection passes its output on as it is and computes
  the exact gradient of δS in the backward pass. `generate` runs without any hook.
- *Hook mode*: the weights stay W, and a hook adds the product to every output, in generation too. It is the form in
  which the method was first described, slower, and there to compare with.

δS is float32 and zero at the start, where the model is unchanged bit by bit. There is one parameter per shape of
module, [M, R], with one row per module, so an optimizer, a projection or a sum over processes handles few tensors.
The adapter is a submodule ``delta_s`` of the model, so any trainer finds its parameters.

Shapes: M modules of a group, R coordinates of δS.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from assay.errors import ModelError, UsageError
from assay.models.wide import wide_products
from assay.vhack.delta.export import LoRA, plain_weights, save_lora
from assay.vhack.delta.file import load_delta, save_delta
from assay.vhack.delta.rollouts import Rollouts
from assay.vhack.gradients.division import is_sharded, local, local_rows, of_one_tensor, reshard, whole
from assay.vhack.gradients.fused import sample_products
from assay.vhack.gradients.svd import Factors, SVDCache, weight_svd
from assay.vhack.gradients.taps import delta_gradient
from assay.vhack.gradients.targets import module_of, target_modules, tensor_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from assay.models.load import Model


# --------------------------------------------------------------------------------------------------
# Modules of one shape side by side, so that one batched product serves all of them.
#
# A model of 252 projections has some five shapes. ``W' = W + U diag(δS) Vh`` is then five products instead of 252.
#
# Under FSDP2 a weight is a DTensor whose rows are spread over the processes. Each process merges the rows that it has:
# row o of W' needs row o of W and U, and all of δS and Vh, so nothing is sent.
#
# Shapes: M modules of a group, O outputs, I inputs, R coordinates of δS.

# Bytes of U diag(δS) that are held at once. More is not faster and would double the memory of large models.
_CHUNK_BYTES = 1 << 28


@dataclass(eq=False)
class Group:
    """The modules of one shape.

    Attributes:
        names: Names of the modules, in the order of the model.
        linears: The modules themselves.
        left: U of each module, [M, O, R].
        right: Vh of each module, [M, R, I].
        values: S of each module, [M, R].
        errors: Residual and orthogonality of each decomposition.
        base: Weights as they were, [M, O, I]; only the rows of this process under FSDP2.
    """

    names: tuple[str, ...]
    linears: tuple[nn.Linear, ...]
    left: Tensor
    right: Tensor
    values: Tensor
    errors: tuple[tuple[float, float], ...]
    base: Tensor
    _rows: slice | None = field(default=None, init=False, repr=False)

    @property
    def rank(self) -> int:
        """Number R of coordinates."""
        return self.left.shape[2]

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are spread over processes, even while they are gathered."""
        return self._rows is not None or is_sharded(self.linears[0].weight)

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 in hex of each whole weight as it was, by name."""
        return {name: tensor_digest(base) for name, base in zip(self.names, self.base, strict=True)}

    def factors(self, index: int) -> Factors:
        """Return the factors of one module, as views."""
        return Factors(self.left[index], self.values[index], self.right[index], *self.errors[index])

    @torch.no_grad()
    def merge(self, delta_MR: Tensor) -> None:
        """Write ``W + U diag(δS) Vh`` into the weights, from the weights as they were.

        The sum is rounded once, so errors of earlier steps do not accumulate. A module whose δS is zero gets its
        weights back bit by bit; adding a zero would lose the sign of a negative zero.
        """
        weights = self._destinations()
        left_MOR = self.left if self._rows is None else self.left[:, self._rows]
        active_M = delta_MR.any(dim=1)
        size = max(1, _CHUNK_BYTES // (self.left[0].numel() * self.left.element_size()))
        for first in range(0, len(self.names), size):
            part = slice(first, first + size)
            merged = _sum(self.base[part], left_MOR[part], delta_MR[part], self.right[part])
            merged = torch.where(active_M[part, None, None], merged, self.base[part])
            torch._foreach_copy_(weights[part], list(merged.unbind()))

    @torch.no_grad()
    def restore(self) -> None:
        """Write the weights as they were."""
        torch._foreach_copy_(self._destinations(), list(self.base.unbind()))

    def _destinations(self) -> list[Tensor]:
        """Return the weights of this process; the first time they are sharded, ``base`` is cut to the same rows."""
        weights: list[Tensor] = [linear.weight for linear in self.linears]
        if not is_sharded(weights[0]):
            return weights
        if self._rows is None:
            _ = self.digests  # of the whole weights
            self._rows = local_rows(weights[0])
            self.base = self.base[:, self._rows].clone()
        return [local(weight) for weight in weights]


def _sum(base_MOI: Tensor, left_MOR: Tensor, delta_MR: Tensor, right_MRI: Tensor) -> Tensor:
    scaled_MOR = (left_MOR * delta_MR[:, None]).to(right_MRI.dtype)
    if base_MOI.dtype == right_MRI.dtype:
        return torch.baddbmm(base_MOI, scaled_MOR, right_MRI)
    return (base_MOI + torch.bmm(scaled_MOR, right_MRI)).to(base_MOI.dtype)


def grouped(modules: Mapping[str, nn.Linear], factors: Mapping[str, Factors]) -> list[Group]:
    """Return groups of modules of one shape, rank, dtype and device, in the order of their first modules.

    Raises:
        UsageError: A module has no factors, or factors of another shape.
        ModelError: The weights are already sharded.
    """
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name, linear in modules.items():
        _check(name, linear, factors)
        kind = (linear.weight.shape, factors[name].rank, linear.weight.dtype, linear.weight.device)
        kinds.setdefault(kind, []).append(name)
    groups = []
    for names in kinds.values():
        linears, each = [modules[name] for name in names], [factors[name] for name in names]
        group = Group(
            tuple(names),
            tuple(linears),
            torch.stack([one.left for one in each]),
            torch.stack([one.right for one in each]),
            torch.stack([one.values for one in each]),
            tuple((one.residual, one.orthogonality) for one in each),
            torch.stack([linear.weight.detach() for linear in linears]),
        )
        groups.append(group)
    return groups


def _check(name: str, linear: nn.Linear, factors: Mapping[str, Factors]) -> None:
    if is_sharded(linear.weight):
        raise ModelError(
            f"{name} is already sharded", wanted="whole weights", do="attach the adapter before fully_shard"
        )
    shape = (factors[name].left.shape[0], factors[name].right.shape[1]) if name in factors else None
    if shape != tuple(linear.weight.shape):
        raise UsageError(
            f"factors of {name} for a matrix {shape}" if shape else f"no factors of {name}",
            wanted=f"factors of its weight, {list(linear.weight.shape)}",
            do="compute them with weight_svd of this very model",
        )


# --------------------------------------------------------------------------------------------------
# The product that a module adds, and its gradient with respect to δS.
#
#     y = W x + U diag(δS) Vh x        ∂L/∂δS = Σ_t (Uᵀ ∂L/∂y_t) ⊙ (Vh x_t)
#
# In *hook mode* the second term is computed and added. In *merged mode* it is already in the weights, the output of the
# Linear is passed on as it is, and only the gradient is computed here. Its sum is done in one of two orders:
#
# - *project*: Uᵀ ∂L/∂y and Vh x per token, 2·T·R·(O + I) operations for T tokens;
# - *outer*: first ``G = Σ_t ∂L/∂y_t x_tᵀ``, the gradient that W would have, then ``diag(Uᵀ G Vhᵀ)``, 2·(T + R)·O·I
#   operations. For a square matrix this is less as soon as T > R, and in the limit half.
#
# Gradients of single samples can only be computed by projecting. Where sums over a few kinds of samples are enough, each
# kind has its outer sum, if that saves enough: it takes several operations per kind, and a GPU must be sent each of them.
#
# Both are exact; they differ in rounding. What is kept for the backward pass in merged mode is x, which the q, k and v
# projections share, and gate and up as well.
#
# Shapes: B samples, T tokens, N = B·T of them, O outputs, I inputs, R coordinates of δS, G kinds.

# Multiplications that a sum per kind must save; on a GPU, those that it does while the operations are being sent.
_WORTH = {"cuda": 2e10}


@dataclass(frozen=True, eq=False)
class Kinds:
    """Which samples of a batch are of which kind; each sample is of one kind.

    Attributes:
        members: Indices of the samples of each kind, [≤B] int64.
        weights: Membership, [G, B] float32, 1 where a sample is of a kind.
    """

    members: tuple[Tensor, ...]
    weights: Tensor

    @classmethod
    def of(cls, chosen: Sequence[Tensor], device: torch.device) -> "Kinds":
        """Return the kinds given one mask per kind, [B] bool on the CPU."""
        weights_GB = torch.stack(list(chosen)).float()
        return cls(tuple(mask.nonzero()[:, 0].to(device) for mask in chosen), weights_GB.to(device))


@dataclass(frozen=True, eq=False)
class Plan:
    """What the product of one module needs.

    Attributes:
        name: Name of the module.
        left: Matrix U, [O, R].
        right: Matrix Vh, [R, I].
        adds: Whether the product is added to the output, as in hook mode.
        rows: Takes gradients per sample, [B, R], or per kind of samples, [G, R], where they are wanted.
        kinds: Kinds of the samples; None keeps samples apart.
    """

    name: str
    left: Tensor
    right: Tensor
    adds: bool
    rows: Callable[[Tensor], None] | None = None
    kinds: Kinds | None = None


def adapt(output: Tensor, inputs: Tensor, delta_R: Tensor, plan: Plan) -> Tensor:
    """Return the output of a module with its product added (hook mode) or as it is (merged mode).

    Args:
        output: Output of the module, [..., O].
        inputs: Inputs of the module, [..., I].
        delta_R: δS of the module, [R]; its gradient is computed in the backward pass.
        plan: What the product needs.

    Raises:
        ModelError: Gradients of samples are wanted, and the inputs are not [samples, tokens, width].
    """
    if plan.rows is not None and inputs.ndim != 3:
        raise ModelError(
            f"{plan.name} is given inputs of shape {list(inputs.shape)}",
            wanted="[samples, tokens, width] for gradients of single samples",
            do="do not pack samples into one row, or do without per_sample",
        )
    result: Tensor = _Adapted.apply(output, inputs, delta_R, plan)  # type: ignore[no-untyped-call]
    return result


class _Adapted(torch.autograd.Function):
    """`adapt` as a function of autograd."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, delta_R: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        if not plan.adds:
            ctx.save_for_backward(inputs)
            return output.view_as(output)
        ctx.save_for_backward(inputs, delta_R)
        with torch.autocast(output.device.type, enabled=False):
            along = _to(inputs, plan.right) @ plan.right.T
            added = (along * delta_R).to(plan.left.dtype) @ plan.left.T
        # A zero is not added but left out: -0 + 0 would be another zero.
        return torch.where(added == 0, output, (output + added).to(output.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        inputs, *rest = ctx.saved_tensors
        plan: Plan = ctx.plan
        of_output, of_inputs, of_delta, _ = ctx.needs_input_grad
        with torch.autocast(gradient.device.type, enabled=False), wide_products(gradient):
            to_inputs = _of_inputs(gradient, inputs, rest[0], plan) if plan.adds and of_inputs else None
            to_delta = _of_delta(gradient, inputs, plan) if of_delta else None
        return gradient if of_output else None, to_inputs, to_delta, None


def _of_inputs(gradient: Tensor, inputs: Tensor, delta_R: Tensor, plan: Plan) -> Tensor:
    along = (_to(gradient, plan.left) @ plan.left) * delta_R
    return (along.to(plan.right.dtype) @ plan.right).to(inputs.dtype)


def _of_delta(gradient: Tensor, inputs: Tensor, plan: Plan) -> Tensor:
    gradient, inputs = _to(gradient, plan.left), _to(inputs, plan.right)
    if plan.rows is None:
        return _summed(gradient.flatten(0, -2)[None], inputs.flatten(0, -2)[None], plan)[0]
    rows_BR = _summed(gradient, inputs, plan) if plan.kinds is None else _by_kind(gradient, inputs, plan, plan.kinds)
    plan.rows(rows_BR)
    return rows_BR.sum(dim=0)


def _by_kind(gradient_BTO: Tensor, inputs_BTI: Tensor, plan: Plan, kinds: Kinds) -> Tensor:
    """Return the gradient summed over the samples of each kind, [G, R] float32."""
    filled = sum(len(members) > 0 for members in kinds.members)
    saved = _multiplications_saved(inputs_BTI.shape[0] * inputs_BTI.shape[1], filled, plan)
    if saved <= _WORTH.get(gradient_BTO.device.type, 0.0):
        return kinds.weights @ _summed(gradient_BTO, inputs_BTI, plan)
    sums = []
    for members in kinds.members:
        whole = len(members) == len(inputs_BTI)
        theirs, taken = (x if whole else x.index_select(0, members) for x in (gradient_BTO, inputs_BTI))
        sums.append(_summed(theirs.flatten(0, 1)[None], taken.flatten(0, 1)[None], plan)[0])
    return torch.stack(sums)


def _multiplications_saved(tokens: int, sums: int, plan: Plan) -> int:
    """Return how many multiplications fewer the outer order has, for so many tokens in so many sums."""
    (outputs, rank), width = plan.left.shape, plan.right.shape[1]
    return tokens * rank * (outputs + width) - (tokens + sums * rank) * outputs * width


def _summed(gradient_BTO: Tensor, inputs_BTI: Tensor, plan: Plan) -> Tensor:
    """Return Σ_t (Uᵀ g_t) ⊙ (Vh x_t) for every b, [B, R] float32, in the order with fewer multiplications."""
    if _multiplications_saved(inputs_BTI.shape[1], 1, plan) > 0:
        return delta_gradient(gradient_BTO.transpose(1, 2) @ inputs_BTI, plan.left, plan.right)
    return sample_products(gradient_BTO @ plan.left, inputs_BTI @ plan.right.T)


def _to(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor if tensor.dtype == other.dtype else tensor.to(other.dtype)


_NAME = "delta_s"
_MODES = ("merged", "hook")
_LORA = "lora_"  # in the names of PEFT's parameters


class DeltaS(nn.Module):
    """A small trainable adapter that is attached to a model when it is constructed.

    All other parameters of the model, except LoRA of PEFT, are frozen until `detach` or `merge`. LoRA may also be added
    afterwards, but `get_peft_model` freezes δS: call ``adapter.delta.requires_grad_(True)`` after it. Do not copy a
    model that has an adapter: the copy would hold hooks of the first one. `disabled` gives the reference policy without
    a copy.

    Args:
        model: Causal language model; under FSDP2 attach before ``fully_shard``, under DDP before wrapping.
        svd: Factors of its weights from :func:`assay.vhack.weight_svd`; None computes them. They fix what the
            coordinates of δS mean, so a basis must come from the same factors.
        mode: Either ``"merged"`` or ``"hook"``.

    Attributes:
        groups: Modules by shape.
        delta: δS, one parameter per group, [M, R] float32.
        mode: Mode of the adapter.

    Raises:
        UsageError: The mode is unknown, the factors do not fit, or there is an adapter already.
        ModelError: The model has no target projections, or is sharded already.

    Example::

        model = load_model("reference:organism", dtype="float32")
        svd = weight_svd(model)
        adapter = DeltaS(model, svd)  # the model computes as before, bit by bit
        with adapter.disabled():
            reference = model.module(ids).logits
        adapter.save("delta.safetensors")
        adapter.merge().save_pretrained("trained")  # a plain model
    """

    def __init__(self, model: "Model | PreTrainedModel", svd: SVDCache | None = None, *, mode: str = "merged") -> None:
        super().__init__()
        if mode not in _MODES:
            raise UsageError(f"mode={mode!r} of the adapter", wanted=" or ".join(_MODES), do="choose one of them")
        module = module_of(model)
        if hasattr(module, _NAME):
            raise UsageError("a model that has an adapter", wanted="one without", do="call detach or merge of it first")
        self.mode = mode
        check_attachable(module)
        modules = target_modules(module)
        factors = svd if svd is not None else weight_svd(module)
        self._rank = factors.rank
        self.groups: list[Group] = grouped(modules, factors)
        self.delta = nn.ParameterList(
            nn.Parameter(group.values.new_zeros(group.values.shape, dtype=torch.float32)) for group in self.groups
        )
        self._enabled = True
        self._rollouts: Rollouts | None = None
        self._undo = ExitStack()
        # Not as an attribute: the model would become a submodule of its own submodule.
        self.__dict__["_model"] = module
        self._merged: list[Tensor] = []
        self._merged_at = self._versions()
        others = [parameter for name, parameter in module.named_parameters() if _LORA not in name]
        required = [(parameter, parameter.requires_grad) for parameter in others]
        self._undo.callback(lambda: [parameter.requires_grad_(flag) for parameter, flag in required])
        for parameter in others:
            parameter.requires_grad_(False)
        module.add_module(_NAME, self)
        self._undo.callback(delattr, module, _NAME)
        self._hook()
        self._undo.callback(self._unhook)
        generate: Any = getattr(module, "generate", None)
        if self.mode == "merged" and generate is not None:
            if "generate" in vars(module):
                self._undo.callback(setattr, module, "generate", generate)
            self._undo.callback(vars(module).pop, "generate")
            vars(module)["generate"] = self._plainly(generate)
        self._look()

    @property
    def model(self) -> "PreTrainedModel":
        """The adapted model itself."""
        found: PreTrainedModel = self.__dict__["_model"]
        return found

    @property
    def svd(self) -> SVDCache:
        """Factors of the weights as they were at the start, as views: for gradients in the same coordinates."""
        factors = {name: group.factors(index) for group in self.groups for index, name in enumerate(group.names)}
        return SVDCache(factors, rank=self._rank, dtype=self.groups[0].left.dtype)

    def values(self) -> dict[str, Tensor]:
        """Return δS by module name, [R] float32, without gradient and, if it was sharded, whole."""
        pairs = zip(self.groups, self._whole(), strict=True)
        return {name: delta_R for group, delta_MR in pairs for name, delta_R in zip(group.names, delta_MR, strict=True)}

    def refresh(self) -> None:
        """Merge the present δS into the weights; nothing to do in hook mode or while it is disabled.

        This happens by itself before a forward pass or `generate` after δS was changed in place, and after every step
        of a :class:`ProjectedOptimizer`. Under FSDP2 every process must call it, if one does.
        """
        if self.mode == "merged" and self._enabled:
            reshard(self.model)
            self._merge()

    def _merge(self) -> None:
        values = self._whole()
        for group, values_MR in zip(self.groups, values, strict=True):
            group.merge(values_MR)
        self._merged = [values_MR.clone() for values_MR in values] if self.groups[0].is_sharded else []
        self._merged_at = self._versions()

    def _is_stale(self) -> bool:
        """Return whether δS has changed since it was merged.

        In a forward pass under FSDP2 its parameters are gathered anew and versions say nothing, so values are compared.
        """
        if self.mode == "hook":
            return False
        if not self.groups[0].is_sharded:
            return self._merged_at != self._versions()
        pairs = zip(self._whole(), self._merged, strict=True)
        return not self._merged or any(not torch.equal(now_MR, merged_MR) for now_MR, merged_MR in pairs)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Make the model compute as before any training, for instance as the reference policy.

        In merged mode the weights point at the stored ones meanwhile; nothing is copied, and a backward pass that is
        still to come afterwards is right. Under FSDP2 they are copied.
        """
        enabled, self._enabled = self._enabled, False
        try:
            with self._originals() if enabled and self.mode == "merged" else nullcontext():
                yield
        finally:
            self._enabled = enabled

    @contextmanager
    def per_sample(self) -> Iterator[Rollouts]:
        """Keep the gradient of every sample of the backward passes in this block; see :class:`Rollouts`.

        Raises:
            ModelError: Samples are packed into one row; raised by the forward pass.
        """
        before, self._rollouts = self._rollouts, Rollouts([len(group.names) for group in self.groups])
        try:
            yield self._rollouts
        finally:
            self._rollouts = before

    def detach(self) -> "PreTrainedModel":
        """Remove the adapter and return the model as it was before, bit by bit, its ``requires_grad`` included.

        Raises:
            UsageError: In a block of :meth:`disabled`, which puts the merged weights back at its end.
        """
        self._refuse_disabled("detach")
        if self.mode == "merged" and hasattr(self.model, _NAME):
            for group in self.groups:
                group.restore()
        self._undo.close()
        return self.model

    def merge(self) -> "PreTrainedModel":
        """Make δS part of the weights for good, remove the adapter and return the plain model, to be saved or served.

        δS itself stays readable in `delta`. In hook mode this is where the sum is rounded to the dtype of the weights.

        Raises:
            UsageError: In a block of :meth:`disabled`, at whose end the weights of before would be taken away.
        """
        self._refuse_disabled("merge")
        self.mode = "merged"
        reshard(self.model)
        self._merge()
        self._undo.close()
        return self.model

    def _refuse_disabled(self, name: str) -> None:
        if not self._enabled:
            raise UsageError(f"{name} inside disabled()", wanted="an adapter at work", do="leave the block first")

    def save(self, path: str | Path) -> None:
        """Write δS as one safetensors file, [R] float32 by module name, with hashes of δS and of the weights.

        Raises:
            StorageError: The file cannot be written.
        """
        save_delta(Path(path), self.groups, self.values())

    def load(self, path: str | Path) -> None:
        """Read δS from a file and merge it.

        Raises:
            DataError: The file was not written by `save`, is damaged, holds numbers that are not finite or not float32,
                or belongs to other weights or other factors.
        """
        found = load_delta(Path(path), self.groups)
        for parameter, group in zip(self.delta, self.groups, strict=True):
            delta_MR = torch.stack([found[name] for name in group.names])
            local(parameter).copy_(delta_MR[local_rows(parameter)])
        self.refresh()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of the model of now as a plain one has them: for an inference engine after a step.

        Names are those of the model without δS and without PEFT, tied weights come once, and LoRA beside δS is merged.
        Under FSDP2 weights are gathered one at a time, and every process must iterate to the end.

        Raises:
            UsageError: The adapter is in hook mode, whose weights are those from before.
            ModelError: LoRA is merged already, or beside weights that are sharded.
        """
        if self.mode == "hook":
            raise UsageError("weights in hook mode", wanted="merged mode", do="attach DeltaS with mode='merged'")
        if self._is_stale():
            self.refresh()
        reshard(self.model)
        yield from plain_weights(self.model)

    def save_lora(self, folder: str | Path, rank: int) -> LoRA:
        """Write δS as LoRA of PEFT, for what cannot take merged weights, and return how far it is from them.

        Args:
            folder: Directory of the files ``adapter_config.json`` and ``adapter_model.safetensors``.
            rank: Rank of every matrix; the largest of δS are kept.

        Raises:
            UsageError: The rank is below 1.
            StorageError: A file cannot be written.
        """
        return save_lora(Path(folder), self.values(), dict(self.svd), rank, str(self.model.config._name_or_path))

    def _whole(self) -> list[Tensor]:
        """Return δS per group, [M, R] without gradient, gathered if it is sharded."""
        return [whole(parameter).detach() for parameter in self.delta]

    def _versions(self) -> tuple[tuple[int, int], ...]:
        return tuple((id(parameter), parameter._version) for parameter in self.delta)

    def _hook(self) -> None:
        """Hook the model and every module. Each forward pass of the model takes new views of δS."""
        self._handles = [self.model.register_forward_pre_hook(self._before)]
        for g, group in enumerate(self.groups):
            for m, linear in enumerate(group.linears):
                self._handles.append(linear.register_forward_hook(self._behind(g, m)))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, module: nn.Module, *_: object) -> None:
        if not self._enabled or module is not self.model:
            return
        if self._is_stale():
            self.refresh()
        if torch.is_grad_enabled() or self.mode == "hook":
            self._look()

    def _look(self) -> None:
        """Take views of δS, one per module, that lead back to the parameters."""
        self._views = [whole(parameter).unbind() for parameter in self.delta]

    def _behind(self, g: int, m: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        group = self.groups[g]
        adds = self.mode == "hook"
        plan = Plan(group.names[m], group.left[m], group.right[m], adds)

        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            # A copy of the model, such as the one extraction uses, has these hooks too, but no gradient of this δS.
            wanted = torch.is_grad_enabled() and self.delta[g].requires_grad and module is group.linears[m]
            if not self._enabled or not (adds or wanted):
                return None
            view_R = self._views[g][m] if wanted else self._views[g][m].detach()
            if self._rollouts is None or not wanted:
                return adapt(output, arguments[0], view_R, plan)
            wanted_rows = partial(self._rollouts.record, g, m)
            return adapt(output, arguments[0], view_R, replace(plan, rows=wanted_rows, kinds=self._rollouts.kinds))

        return hook

    def _plainly(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(generate)
        def plain(*arguments: Any, **keywords: Any) -> Any:
            if self._enabled and self._is_stale():
                self.refresh()
            hooked = bool(self._handles)  # not where `generate` calls itself, and not after `detach`
            self._unhook()
            try:
                return generate(*arguments, **keywords)
            finally:
                if hooked:
                    self._hook()

        return plain

    @contextmanager
    def _originals(self) -> Iterator[None]:
        sharded = self.groups[0].is_sharded
        if sharded:
            reshard(self.model)
            for group in self.groups:
                group.restore()
        else:
            weights = [linear.weight for group in self.groups for linear in group.linears]
            merged = [weight.data for weight in weights]
            for weight, base in zip(weights, (base for group in self.groups for base in group.base), strict=True):
                weight.data = base
        try:
            yield
        finally:
            if sharded:
                reshard(self.model)
                self._merge()
            else:
                for weight, data in zip(weights, merged, strict=True):
                    weight.data = data


def check_attachable(model: "Model | PreTrainedModel") -> None:
    """Refuse a model that can have no δS, before its weights are decomposed.

    Raises:
        ModelError: The model is a mixture whose experts share a tensor, or has no target projections.
    """
    if experts := of_one_tensor(module_of(model), target_modules(model)):
        raise ModelError(
            f"{experts[0]} and {len(experts) - 1} more matrices of experts in one tensor",
            wanted="a dense model: δS of such experts is extracted and checked, but not trained",
            do="train a dense model",
        )
