"""The δS gradient of every sample from passes of a model that is divided, run as it is.

What divides a model is hooked onto its modules, so it cannot be copied. Hooks of torch stand behind
the targets for the time of a pass, and see all tokens of inputs and outputs; the model is left as
it was. Each process keeps the factors of a share of the matrices, is given all samples, and
projects what it sees of its matrices; the results are added up. So factors are divided, and the
passes are not: n processes take as long as one with room for the whole model.

Shapes: N rows of all tokens, B samples, O outputs, I inputs, R coordinates of δS.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from assay.errors import ModelError
from assay.models.decoder import decoder_layers
from assay.models.device import current
from assay.models.model import PreTrained
from assay.models.precision import own_precision
from assay.vhack.directions.gradients.batches import Encoded, SampleBatch
from assay.vhack.directions.gradients.division import Division, gather_features, gather_whole
from assay.vhack.directions.gradients.gradient_operations import TokenLoss, segment_products
from assay.vhack.directions.gradients.replica import Computed, recomputed_forward, stack_rows
from assay.vhack.directions.gradients.svd import Factors
from assay.vhack.directions.gradients.taps import Passed


@dataclass(eq=False)
class DividedPass:
    """Turns batches into δS gradients, as a :class:`Replica` of a whole model does.

    Every process calls it with the same batches, in the same order.
    """

    module: PreTrained
    targets: Mapping[str, nn.Linear]
    factors: Mapping[str, Factors]  # of the targets of this process
    lengths: Mapping[str, int]  # number of coordinates of each target
    division: Division
    is_recomputed: bool  # whether the backward pass computes each layer again
    batch: SampleBatch = field(init=False)  # that is being computed
    _rows: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        names = {name for name, _ in self.module.named_modules()}
        if experts := [name for name in self.targets if name not in names]:
            raise ModelError(
                f"a model in parts: {experts[0]} is an expert in one tensor with others",
                wanted="a dense model, or one that is whole on one device",
                do="load it whole on one device",
            )

    @torch.inference_mode(False)
    @torch.enable_grad()
    def gradients(self, encoded: list[Encoded]) -> Computed:
        """Run one forward and one backward pass, and return the gradients in every process."""
        device = self.division.device
        self.batch = batch = SampleBatch.build(encoded, device, packed=False)
        self._rows.clear()
        with (
            ExitStack() as undo,
            current(device),
            own_precision(torch.empty(0, dtype=self.module.dtype, device=device)),
        ):
            # Requires a gradient and gets none: it makes the backward pass come to every target.
            trigger = torch.zeros((), dtype=torch.float32, requires_grad=True)
            self._watch(trigger, undo)
            logits = gather_whole(self.module(input_ids=batch.ids, use_cache=False).logits)
            wanted = self.module.config.get_text_config().vocab_size
            if logits.shape[-1] < wanted:
                raise ModelError(
                    f"a head that gives {logits.shape[-1]} of {wanted} logits to a process",
                    wanted="all logits in every process",
                    do="give the head ColwiseParallel(output_layouts=Replicate())",
                )
            rows_M, labels_M, weights_M = (
                part.to(logits.device)
                for part in (batch.label_rows, batch.labels, batch.loss_weights)
            )
            losses_M = TokenLoss.apply(logits.flatten(0, 1)[rows_M], labels_M)  # type: ignore[no-untyped-call]
            # Not `backward`, which would leave gradients of weights, and have FSDP2 reduce them.
            torch.autograd.grad(losses_M, trigger, weights_M, allow_unused=True)
        together_BR = stack_rows(self._rows, self.lengths, len(encoded), device)
        if self.division.group is not None:
            dist.all_reduce(together_BR, group=self.division.group)
        return Computed(batch, together_BR.cpu(), losses_M.detach().cpu(), None, {})

    def _watch(self, trigger: Tensor, undo: ExitStack) -> None:
        """Put hooks behind the targets, and dropout off, until the pass is over."""
        for part in self.module.modules():
            undo.callback(setattr, part, "training", part.training)
            part.training = False
        for name, linear in self.targets.items():
            # Before the hooks of tensor parallelism, which hand on a part of the output.
            hook = partial(self._behind, trigger, name)
            undo.callback(linear.register_forward_hook(hook, prepend=True).remove)
        for layer in decoder_layers(self.module) if self.is_recomputed else ():
            forward = layer.forward
            if "forward" in vars(layer):
                undo.callback(vars(layer).__setitem__, "forward", forward)
            else:
                undo.callback(vars(layer).pop, "forward")
            vars(layer)["forward"] = recomputed_forward(forward, self.module)

    def _behind(
        self, trigger: Tensor, name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        leave = partial(self._leave, name)
        return cast("Tensor", Passed.apply(output, trigger, inputs[0].detach(), leave))  # type: ignore[no-untyped-call]

    def _leave(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        """Add the gradient of every sample, [B, R], where this process has the factors."""
        linear = self.targets[name]
        inputs_NI = gather_features(inputs, linear.in_features, linear.weight)
        gradient_NO = gather_features(gradient, linear.out_features, linear.weight)
        if len(inputs_NI) != self.batch.ids.numel() or len(gradient_NO) != len(inputs_NI):
            raise ModelError(
                f"{name} is given {len(inputs_NI)} rows of {self.batch.ids.numel()} tokens",
                wanted="all tokens of the samples in every process",
                do="divide a dense model, without sequence or context parallelism",
            )
        if name not in self.factors:
            return
        factors = self.factors[name]
        along_NR = inputs_NI.to(factors.right) @ factors.right.T
        projected_NR = gradient_NO.to(factors.left) @ factors.left
        offsets = self.batch.segments.offsets.to(along_NR.device)
        rows_BR = segment_products(projected_NR, along_NR, offsets, None)
        before_BR = self._rows.get(name)
        self._rows[name] = rows_BR if before_BR is None else before_BR + rows_BR
