"""SHA-256 of weights in memory: the key of a basis and of a cached factorisation."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from assay.models import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK = 1 << 25


def module_of(model: "Model | PreTrainedModel") -> "PreTrainedModel":
    """Return the transformers model inside, or the model itself."""
    return model.module if isinstance(model, Model) else model


def weights_digest(model: "Model | PreTrainedModel") -> str:
    """Return the SHA-256 in hex over every parameter in memory: names, dtypes, shapes and bytes, a tied one once.

    Unlike ``Model.digest`` it changes when the model is trained, and with the dtype it was loaded in.
    """
    parameters = sorted(module_of(model).named_parameters())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda item: f"{item[0]}\n{tensor_digest(item[1])}\n", parameters)
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 in hex of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}\n{list(tensor.shape)}\n".encode())
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    if not flat.is_cuda:
        digest.update(flat.numpy().data)
        return digest.hexdigest()
    # Through one page-locked buffer: a copy of a whole tensor to fresh memory takes several times as long.
    buffer = torch.empty(min(_CHUNK, len(flat)), dtype=torch.uint8, pin_memory=True)
    for part in torch.split(flat, _CHUNK):
        digest.update(buffer[: len(part)].copy_(part).numpy().data)
    return digest.hexdigest()
