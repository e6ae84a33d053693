import torch

from assay.models.decoder import backbone
from assay.poc.protocol.transforms import unit


def test_a_guess_is_better_the_deeper_it_starts(small_model, inputs_btd, guesses):
    states: list[torch.Tensor] = []
    body = backbone(small_model.module)
    handles = [layer.register_forward_pre_hook(lambda m, a: states.append(a[0])) for layer in body.layers]
    with torch.inference_mode():
        truth = unit(body(inputs_embeds=inputs_btd, use_cache=False).last_hidden_state)
    for handle in handles:
        handle.remove()
    errors = [(guesses.end(depth, x) - truth).norm(dim=-1).square().mean().item() for depth, x in enumerate(states)]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] < 1, "better than knowing nothing"


def test_updates_have_the_shape_of_their_input(guesses, inputs_btd):
    for part in ("attention", "mlp"):
        assert guesses.update(part, 1, inputs_btd[:, :3]).shape == inputs_btd[:, :3].shape
