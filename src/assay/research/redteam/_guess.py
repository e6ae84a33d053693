"""What an attacker can know in advance: the inputs are noise of a known law, so maps can be fitted before any round.

For every layer, a linear map gives the update of the attention and of the MLP from their normed input; for every
depth, one gives the final unit state from the state at that depth. All are ridge regressions on rounds of the
attacker's own, so a guess shrinks towards the mean where it knows little.

Legend of shapes: B nonces, T positions, N rows, D hidden size, E = D + 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from assay.models import Model, backbone, decoder_layers
from assay.poc.protocol import unit

__all__ = ["Guesses"]

RIDGE = 1e-4  # of the mean square of an input coordinate


class Guesses:
    """Maps fitted on inputs that the attacker drew.

    Args:
        model: Honest model.
        inputs_BTD: Noise of the law of the rounds, of another block.
    """

    def __init__(self, model: Model, inputs_BTD: Tensor) -> None:
        self.cost = model.hidden_size**2
        updates, states = _observe(model, inputs_BTD)
        with torch.inference_mode():
            body: Any = backbone(model.module)
            final_ND = unit(body.norm(states[-1])).float().flatten(0, 1)
            self._updates = {name: _fit(_with_one(x), y) for name, (x, y) in updates.items()}
            self._ends = [_fit(_with_one(unit(x)), final_ND) for x in states[:-1]]

    def update(self, part: str, index: int, x_BAD: Tensor) -> Tensor:
        """Return the update that attention or mlp of a layer would make, from its normed input [B, A, D]."""
        return _with_one(x_BAD) @ self._updates[part, index]

    def end(self, depth: int, x_BAD: Tensor) -> Tensor:
        """Return the final unit state of positions from their state before layer ``depth``."""
        return _with_one(unit(x_BAD)) @ self._ends[depth]


def _observe(model: Model, inputs_BTD: Tensor) -> tuple[dict[tuple[str, int], tuple[Tensor, Tensor]], list[Tensor]]:
    """Run the honest model; return inputs and outputs of its parts, and the state before every layer and after all."""
    updates: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    states: list[Tensor] = []
    handles = []
    layers: Any = decoder_layers(model.module)

    def keep(part: str, index: int) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, keywords: Any, output: Any) -> None:
            x = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
            updates[part, index] = (x, output[0] if isinstance(output, tuple) else output)

        return hook

    for index, layer in enumerate(layers):
        handles.append(layer.self_attn.register_forward_hook(keep("attention", index), with_kwargs=True))
        handles.append(layer.mlp.register_forward_hook(keep("mlp", index), with_kwargs=True))
        handles.append(layer.register_forward_pre_hook(lambda module, arguments: states.append(arguments[0])))
    body: Any = backbone(model.module)
    handles.append(body.norm.register_forward_pre_hook(lambda module, arguments: states.append(arguments[0])))
    try:
        with torch.inference_mode():
            body(inputs_embeds=inputs_BTD, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return updates, states


def _fit(x: Tensor, y: Tensor) -> Tensor:
    """Ridge regression of y on x, rows over all leading dimensions."""
    x_NE, y_ND = x.flatten(0, -2).double(), y.flatten(0, -2).double()
    gram_EE = x_NE.T @ x_NE
    ridge = RIDGE * gram_EE.diagonal().mean()
    solved: Tensor = torch.linalg.solve(
        gram_EE + ridge * torch.eye(len(gram_EE), dtype=torch.float64, device=gram_EE.device), x_NE.T @ y_ND
    )
    return solved.float()


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x.float(), torch.ones_like(x[..., :1], dtype=torch.float32)], dim=-1)
