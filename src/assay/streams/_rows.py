"""What is wanted of arrays that are on the device already: shapes, dtypes and places, but no values, which would wait.

Shapes: ``N`` rows that get noise, ``R`` rows of scores, ``V`` columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from assay.errors import UsageError
from assay.streams._arrays import dtype_name

if TYPE_CHECKING:
    import torch

WORDS = 8
"""Words of a stream of strength 256."""

_SEEDS = ("uint32", "int32")
_INTEGERS = ("int64", "int32", "uint32")


def check_rows(device: str, scores: torch.Tensor, seeds: torch.Tensor, rows: torch.Tensor | None) -> None:
    """Check the arguments of :meth:`assay.streams.Backend.add_gumbels`.

    Raises:
        UsageError: They are not as its documentation says.
    """
    _check("scores", scores, device, ("float32",), 2)
    count, columns = scores.shape
    if (columns > 1 and scores.stride(1) != 1) or (count > 1 and scores.stride(0) < columns):
        raise UsageError(
            f"scores of shape {tuple(scores.shape)} and strides {scores.stride()}",
            wanted="rows that are contiguous and do not overlap",
            do="call .contiguous() on the scores and add the noise to that",
        )
    _check("seeds", seeds, device, _SEEDS, 1)
    if rows is not None:
        _check("rows", rows, device, ("int64",), 1)
        if rows.device.type == "cpu" and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
            raise UsageError(
                f"rows from {int(rows.min())} to {int(rows.max())} of {count}",
                wanted=f"rows from 0 to {count - 1}",
                do="number the rows of the scores from 0",
            )
    wanted = count if rows is None else len(rows)
    if len(seeds) != wanted:
        raise UsageError(
            f"{len(seeds)} seeds for {wanted} rows",
            wanted="one seed for each row",
            do="name the rows that get noise in rows_N",
        )


def check_steps(device: str, words: torch.Tensor, steps: torch.Tensor) -> None:
    """Check the arguments of :meth:`assay.streams.Backend.row_seeds`.

    Raises:
        UsageError: They are not as its documentation says.
    """
    _check("words", words, device, _SEEDS, 2)
    _check("steps", steps, device, _INTEGERS, 1)
    if words.shape != (len(steps), WORDS):
        raise UsageError(
            f"words of shape {tuple(words.shape)} for {len(steps)} steps",
            wanted=f"{WORDS} words for each step",
            do="repeat the words of a stream for each of its steps",
        )


def as_int32(integers: torch.Tensor) -> torch.Tensor:
    """Return integers as contiguous int32 with the same low 32 bits."""
    import torch

    if integers.dtype == torch.uint32:
        integers = integers.view(torch.int32)
    return integers.to(torch.int32).contiguous()


def _check(name: str, tensor: torch.Tensor, device: str, dtypes: tuple[str, ...], axes: int) -> None:
    dtype = dtype_name(tensor.dtype)
    if dtype not in dtypes or tensor.ndim != axes or not _is_on(tensor, device):
        raise UsageError(
            f"{name} of dtype {dtype} and shape {tuple(tensor.shape)} on {tensor.device}",
            wanted=f"{' or '.join(dtypes)} with {axes} {'axis' if axes == 1 else 'axes'} on {device}",
            do="convert it, or take the backend of its device",
        )


def _is_on(tensor: torch.Tensor, device: str) -> bool:
    """Say whether a tensor is on a device; ``cuda`` without a number is the current one."""
    import torch

    kind, _, number = device.partition(":")
    if kind != tensor.device.type:
        return False
    return kind == "cpu" or tensor.device.index == (int(number) if number else torch.cuda.current_device())
