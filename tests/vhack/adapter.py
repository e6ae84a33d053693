"""What gradients are tested against: plain autograd, one sample at a time, through W + U diag(δS)
Vh written out.
"""

import torch
from scipy.linalg import subspace_angles
from torch.nn import functional

from assay.vhack import target_modules

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
"""Sizes of the models that tests make on the spot."""


def made(family, kind="Config", **changes):
    """A small model of a family with random weights; a setting that is None is left out."""
    import transformers

    torch.manual_seed(0)
    stated = {name: value for name, value in (SMALL | changes).items() if value is not None}
    config = getattr(transformers, f"{family}{kind}")(**stated)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def sequential_gradients(module, tokenizer, samples, svd):
    """The δS gradient of every sample by the definition, [N, R] per module."""
    modules = target_modules(module)
    delta = {name: torch.zeros_like(svd[name].values, requires_grad=True) for name in modules}

    def adapted(name, linear):
        factors = svd[name]

        def forward(inputs):
            change = (factors.left * delta[name]) @ factors.right
            plain = functional.linear(inputs, linear.weight.detach(), linear.bias)
            return plain + functional.linear(inputs, change.to(inputs.dtype))

        return forward

    for name, linear in modules.items():
        linear.forward = adapted(name, linear)
    try:
        rows = [_one(module, tokenizer, sample, delta) for sample in samples]
    finally:
        for linear in modules.values():
            del linear.forward
    return {name: torch.stack([row[name] for row in rows]) for name in modules}


def of_weights(module, tokenizer, samples, svd):
    """The diagonal of Uᵀ G Vhᵀ, where G is what torch finds for the weight itself, one sample at a
    time, [N, R].
    """
    found = {name: [] for name in svd}
    parameters = dict(module.named_parameters())
    for sample in samples:
        module.zero_grad()
        prompt, completion = (
            tokenizer(text)["input_ids"] for text in (sample.prompt, sample.completion)
        )
        logits = module(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[
            0, len(prompt) - 1 : -1
        ]
        functional.cross_entropy(logits, torch.tensor(completion)).backward()
        for name, factors in svd.items():
            tensor, _, expert = name.rpartition(".")
            whole = parameters[tensor if tensor in parameters else f"{name}.weight"].grad
            gradient = (
                torch.zeros(len(factors.left), factors.right.shape[1]) if whole is None else whole
            )
            gradient = gradient[int(expert)] if gradient.ndim == 3 else gradient
            if gradient.shape != (
                len(factors.left),
                factors.right.shape[1],
            ):  # experts may be transposed
                gradient = gradient.T
            found[name].append((factors.left.T @ gradient @ factors.right.T).diagonal())
    return {name: torch.stack(rows) for name, rows in found.items()}


def _one(module, tokenizer, sample, delta):
    prompt, completion = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (sample.prompt, sample.completion)
    )
    logits = module(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    loss = functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), torch.tensor(completion)
    )
    gradients = torch.autograd.grad(
        loss, list(delta.values()), materialize_grads=True
    )  # 0 of an unused expert
    return dict(zip(delta, gradients, strict=True))


def worst_error(found, wanted):
    """The largest relative error of one sample over all modules, or of one module over all samples.

    One sample in one module can be a sum that nearly cancels, in which float32 itself has no more
    than five digits.
    """
    assert found.keys() == wanted.keys()
    errors = {name: found[name] - wanted[name] for name in wanted}
    by_module = max(float(errors[name].norm() / wanted[name].norm()) for name in wanted)
    by_sample = torch.cat(list(errors.values()), 1).norm(dim=1) / torch.cat(
        list(wanted.values()), 1
    ).norm(dim=1)
    return max(by_module, float(by_sample.max()))


def principal_angles(axes_KR, others_JR):
    """The angles between two row spaces in radians, smallest first."""
    return torch.from_numpy(
        subspace_angles(axes_KR.double().T.numpy(), others_JR.double().T.numpy())[::-1].copy()
    )
