"""DeltaS: the adapter ``W + U diag(δS) Vh`` around the projections of any transformers model.

After every optimizer step the weights become ``W + U diag(δS) Vh``, always from the stored W.
Forward passes and generation run on plain weights. A hook on each projection passes its output on
as it is and computes the exact gradient of δS in the backward pass.

δS is float32 and zero at the start, where the model is unchanged bit by bit. There is one parameter
per shape of module, [M, R], with one row per module, so an optimizer, a projection or a sum over
processes handles few tensors. The adapter is a submodule ``delta_s`` of the model, so any trainer
finds its parameters.

Shapes: M modules of a group, R coordinates of δS.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from assay.errors import ModelError, UsageError
from assay.models.model import AnyModel, PreTrained
from assay.vhack.directions.delta.delta_file import load_delta, save_delta
from assay.vhack.directions.delta.groups import (
    ModuleGroup,
    Rollouts,
    gradient_of_delta,
    group_modules,
)
from assay.vhack.directions.gradients.svd import SVDCache, weight_svd
from assay.vhack.directions.gradients.taps import Passed
from assay.vhack.directions.gradients.targets import LORA, check_whole, module_of, target_modules

_NAME = "delta_s"


class DeltaS(nn.Module):
    """A small trainable adapter that is attached to a model when it is constructed.

    All other parameters of the model are frozen until `detach` or `merge`: no gate would hold LoRA
    back beside δS. Do not copy a model that has an adapter: the copy would hold hooks of the first
    one. `disabled` gives the reference policy without a copy.

    Args:
        model: Causal language model; under DDP attach before wrapping. It stays whole:
            ``fully_shard`` is refused.
        svd: Factors of its weights from :func:`assay.vhack.weight_svd`; None computes them. They
            fix what the coordinates of δS mean, so a basis must come from the same factors.

    Attributes:
        groups: Modules by shape.
        delta: δS, one parameter per group, [M, R] float32.
        added: A second δS of that form, in the weights and in no file; see :class:`Quarantine`.

    Raises:
        UsageError: The factors do not fit, or there is an adapter already, or LoRA of PEFT.
        ModelError: The model has no target projections, or is not whole on one device.

    Example::

        model = load_model("reference:organism", dtype="float32")
        svd = weight_svd(model)
        adapter = DeltaS(model, svd)  # the model computes as before, bit by bit
        with adapter.disabled():
            reference = model.module(ids).logits
        adapter.save("delta.safetensors")
        adapter.merge().save_pretrained("trained")  # a plain model
    """

    def __init__(self, model: AnyModel, svd: SVDCache | None = None) -> None:
        super().__init__()
        module = module_of(model)
        if hasattr(module, _NAME):
            raise UsageError(
                "a model that has an adapter",
                wanted="one without",
                do="call detach or merge of it first",
            )
        check_attachable(module)
        factors = svd if svd is not None else weight_svd(module)
        self._rank = factors.rank
        self.groups: list[ModuleGroup] = group_modules(target_modules(module), factors)
        self.delta = nn.ParameterList(
            nn.Parameter(group.left.new_zeros(len(group.names), group.rank, dtype=torch.float32))
            for group in self.groups
        )
        self.added: Sequence[Tensor] = ()
        self._scale = 1.0
        self._enabled = True
        self._rollouts: Rollouts | None = None
        self._undo = ExitStack()
        # Not as an attribute: the model would become a submodule of its own submodule.
        self.__dict__["_model"] = module
        self._merged_at = self._versions()
        required = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        self._undo.callback(
            lambda: [parameter.requires_grad_(flag) for parameter, flag in required]
        )
        module.requires_grad_(False)
        module.add_module(_NAME, self)
        self._undo.callback(delattr, module, _NAME)
        self._undo.callback(module.register_forward_pre_hook(self._prepare_forward).remove)
        for g, group in enumerate(self.groups):
            for m, linear in enumerate(group.linears):
                self._undo.callback(linear.register_forward_hook(self._make_hook(g, m)).remove)
        self._take_views()

    @property
    def model(self) -> PreTrained:
        """The adapted model itself."""
        return cast("PreTrained", self.__dict__["_model"])

    @property
    def svd(self) -> SVDCache:
        """Factors of the weights before training, as views, for gradients in the same
        coordinates.
        """
        factors = {
            name: part
            for group in self.groups
            for name, part in zip(group.names, group.factors, strict=True)
        }
        return SVDCache(factors, rank=self._rank, dtype=self.groups[0].left.dtype)

    def values(self) -> dict[str, Tensor]:
        """Return δS by module name, [R] float32, without gradient."""
        return {
            name: row_R
            for group, rows in zip(self.groups, self.delta, strict=True)
            for name, row_R in zip(group.names, rows.detach(), strict=True)
        }

    def refresh(self) -> None:
        """Merge the present δS into the weights; nothing to do while it is disabled.

        This happens by itself before a forward pass after δS was changed in place, and after every
        step of a :class:`ProjectedOptimizer`.
        """
        if not self._enabled:
            return
        for index, (group, parameter) in enumerate(zip(self.groups, self.delta, strict=True)):
            values_MR = parameter.detach()
            if self.added:
                values_MR = values_MR + self._scale * self.added[index].detach()
            group.merge(values_MR)
        self._merged_at = self._versions()

    def scale_added(self, scale: float) -> None:
        """Merge ``added`` with this factor from now on: 0 is the model that is kept, 1 trains."""
        self._scale = scale
        self.refresh()

    def _merge_changes(self) -> None:
        """Merge δS where it has changed since it was merged."""
        if self._merged_at != self._versions():
            self.refresh()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Make the model compute as before any training, for instance as the reference policy.

        The weights point at the stored ones meanwhile; nothing is copied, and a backward pass that
        is still to come afterwards is right.
        """
        if not self._enabled:  # inside another such block
            yield
            return
        self._enabled = False
        places = [
            place for group in self.groups for place in zip(group.linears, group.base, strict=True)
        ]
        merged = [linear.weight.data for linear, _ in places]
        for linear, base in places:
            linear.weight.data = base
        try:
            yield
        finally:
            for (linear, _), data in zip(places, merged, strict=True):
                linear.weight.data = data
            self._enabled = True

    @contextmanager
    def per_sample(self) -> Iterator[Rollouts]:
        """Keep the gradient of every sample of backward passes in this block: :class:`Rollouts`.

        Raises:
            ModelError: Samples are packed into one row; raised by the forward pass.
        """
        before = self._rollouts
        self._rollouts = Rollouts([len(group.names) for group in self.groups])
        try:
            yield self._rollouts
        finally:
            self._rollouts = before

    def detach(self) -> PreTrained:
        """Remove the adapter, restore weights and ``requires_grad`` bit by bit, return the model.

        Raises:
            UsageError: In a block of :meth:`disabled`, which puts the merged weights back at its
                end.
        """
        self._refuse_disabled("detach")
        if hasattr(self.model, _NAME):
            for group in self.groups:
                group.restore()
        self._undo.close()
        return self.model

    def merge(self) -> PreTrained:
        """Make δS part of the weights for good, and return the plain model without the adapter.

        δS itself stays readable in `delta`.

        Raises:
            UsageError: In a block of :meth:`disabled`, at whose end the weights of before would be
                taken away.
        """
        self._refuse_disabled("merge")
        self.added = ()
        self.refresh()
        self._undo.close()
        return self.model

    def _refuse_disabled(self, name: str) -> None:
        if not self._enabled:
            raise UsageError(
                f"{name} inside disabled()", wanted="an adapter at work", do="leave the block first"
            )

    def save(self, path: str | Path) -> None:
        """Write δS, [R] float32 by module name, as safetensors, with hashes of δS and weights.

        Raises:
            StorageError: The file cannot be written.
        """
        save_delta(Path(path), self.groups, self.values())

    def load(self, path: str | Path) -> None:
        """Read δS from a file and merge it.

        Raises:
            DataError: The file was not written by `save`, is damaged, holds numbers that are not
                finite or not float32, or belongs to other weights or other factors.
        """
        values = load_delta(Path(path), self.groups)
        for parameter, group in zip(self.delta, self.groups, strict=True):
            parameter.detach().copy_(torch.stack([values[name] for name in group.names]))
        self.refresh()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the merged weights as a plain model has them, for an inference engine.

        Names are those of the model without δS, and tied weights come once.
        """
        self._merge_changes()
        for name, parameter in self.model.named_parameters():
            if not name.startswith(f"{_NAME}."):
                yield name, parameter.detach()

    def _versions(self) -> tuple[tuple[int, int], ...]:
        return tuple((id(parameter), parameter._version) for parameter in self.delta)

    def _prepare_forward(self, module: nn.Module, *_: object) -> None:
        if not self._enabled or module is not self.model:
            return
        self._merge_changes()
        if torch.is_grad_enabled():
            self._take_views()

    def _take_views(self) -> None:
        """Take views of δS, one per module, that lead back to the parameters."""
        self._views = [parameter.unbind() for parameter in self.delta]

    def _make_hook(
        self, g: int, m: int
    ) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        group = self.groups[g]

        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            # A copy of the model, such as the one extraction uses, has these hooks too, but no
            # gradient of this δS.
            if (
                not self._enabled
                or not torch.is_grad_enabled()
                or not self.delta[g].requires_grad
                or module is not group.linears[m]
            ):
                return None
            inputs = arguments[0]
            record = None
            if rollouts := self._rollouts:
                if inputs.ndim != 3:
                    raise ModelError(
                        f"{group.names[m]} is given inputs of shape {list(inputs.shape)}",
                        wanted="[samples, tokens, width] for gradients of single samples",
                        do="do not pack samples into one row, or do without per_sample",
                    )
                record = partial(rollouts.record, g, m, rollouts.kinds)
            gradient_of = partial(gradient_of_delta, group.factors[m], record)
            return cast("Tensor", Passed.apply(output, self._views[g][m], inputs, gradient_of))  # type: ignore[no-untyped-call]

        return hook


def check_attachable(model: AnyModel) -> None:
    """Refuse a model that can have no δS, before its weights are decomposed.

    Raises:
        ModelError: The model is a mixture whose experts share a tensor, has no target projections,
            or is not whole on one device.
        UsageError: The model has LoRA of PEFT.
    """
    check_whole(model)
    module_names = {name for name, _ in module_of(model).named_modules()}
    if any(LORA in name for name in module_names):
        raise UsageError(
            "δS beside LoRA",
            wanted="a model without LoRA, which no gate would hold back",
            do="merge LoRA first, or train it with TRL and the arm filter "
            "(assay.vhack.training.Guard)",
        )
    if experts := [name for name in target_modules(model) if name not in module_names]:
        raise ModelError(
            f"{experts[0]} and {len(experts) - 1} more matrices of experts in one tensor",
            wanted="a dense model: δS of such experts is extracted and checked, but not trained",
            do="train a dense model",
        )
