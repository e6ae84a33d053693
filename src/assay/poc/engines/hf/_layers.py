"""Transforms between the decoder layers, for the pipelines that change the model's own computation."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from assay import streams
from assay.models import Model, decoder_layers
from assay.poc.protocol import LayerStep, Round, reflect, unit

LayerFunction = Callable[[Tensor], Tensor]


@contextmanager
def transformed_layers(model: Model, backend: streams.Backend, step: LayerStep, round: Round) -> Iterator[None]:
    """Apply a transform to what every decoder layer returns while the context is open; nothing for the step "none"."""
    layers = [] if step == "none" else list(decoder_layers(model.module))
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            function = _layer_function(model, backend, step, round, index)
            hooks.enter_context(layer.register_forward_hook(partial(_apply, function)))
        yield


def _layer_function(model: Model, backend: streams.Backend, step: LayerStep, round: Round, index: int) -> LayerFunction:
    stream = "layer_signs" if step == "signs" else "layer_reflection"
    seeds = streams.seeds([round.block_text(stream, index)])
    if step == "signs":
        signs_D = streams.as_tensor(backend.signs(seeds, model.hidden_size))[0].to(model.dtype)
        return lambda x_BTD: x_BTD * signs_D
    v_D = streams.as_tensor(backend.normals(seeds, model.hidden_size))[0]
    v_D = (v_D / torch.linalg.vector_norm(v_D)).to(model.dtype)
    if step == "reflect":
        return lambda x_BTD: reflect(x_BTD, v_D)
    return lambda x_BTD: reflect(unit(x_BTD), v_D)


def _apply(function: LayerFunction, layer: nn.Module, args: Any, output: Any) -> Any:
    """Apply a function to the hidden state that a decoder layer returns, in a tuple or not."""
    if isinstance(output, tuple):
        return (function(output[0]), *output[1:])
    return function(output)
