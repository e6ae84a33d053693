"""The deterministic mode: torch refuses every operation that may give other bits the next time."""

import os

import torch

__all__ = ["be_deterministic", "is_deterministic"]


def be_deterministic() -> None:
    """Switch the mode on for this process; call it before the device is used.

    No TensorFloat-32, no sums in less than float32 inside a product, and a workspace of its own for every stream of
    cuBLAS, without which streams that run side by side may choose other kernels.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads memory that it has not written
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def is_deterministic() -> bool:
    """Say whether the mode is on; a fingerprint says it too."""
    return torch.are_deterministic_algorithms_enabled()
