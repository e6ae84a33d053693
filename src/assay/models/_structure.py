"""Where the parts of a causal language model are: the backbone without its head, and the decoder layers."""

from torch import nn

from assay.errors import LayersNotFound

_NAMES = ("layers", "h", "blocks")


def backbone(module: nn.Module) -> nn.Module:
    """The decoder without its head; its ``last_hidden_state`` [B, T, hidden] is taken after the final norm.

    Raises:
        LayersNotFound: the module has no decoder of its own.
    """
    get_decoder = getattr(module, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    if isinstance(decoder, nn.Module) and decoder is not module:
        return decoder
    raise LayersNotFound(
        f"{type(module).__name__} has no decoder below its head",
        wanted="a causal language model of transformers (get_decoder() returns its backbone)",
        do="load the model with assay.models.load_model",
    )


def decoder_layers(module: nn.Module) -> nn.ModuleList:
    """The decoder layers in order, exactly ``config.num_hidden_layers`` of them.

    Raises:
        LayersNotFound: no list of layers, or their number differs from the configuration.
    """
    decoder = backbone(module)
    lists = [getattr(decoder, name, None) for name in _NAMES]
    layers = next((found for found in lists if isinstance(found, nn.ModuleList)), None)
    expected = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    if layers is not None and len(layers) == expected:
        return layers
    seen = "no list of layers" if layers is None else f"{len(layers)} layers where the configuration says {expected}"
    raise LayersNotFound(
        f"{type(decoder).__name__} has {seen}",
        wanted=f"an nn.ModuleList named {', '.join(_NAMES)} with config.num_hidden_layers entries",
        do="use a model whose decoder layers can be found; hooks on a guess would measure something else",
    )
