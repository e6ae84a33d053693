"""Checks of the arguments of a backend, made before any stream is.

Shapes: ``B`` streams of a batch, ``S`` sub-seeds of a stream, ``N`` rows that get noise, of ``R``
rows and ``V`` columns of scores.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from assay.errors import UsageError
from assay.streams.arrays import dtype_name
from assay.streams.definition import UInts

if TYPE_CHECKING:
    import torch

Seeds: TypeAlias = Sequence[int] | Sequence[Sequence[int]] | npt.NDArray[Any]
"""32-bit seeds: ``[B]``, or ``[B, S]`` with S sub-seeds for each stream.

:func:`assay.streams.seeds` makes them.
"""

SEED_DTYPES = ("uint32", "int32")
"""Dtypes of seeds and words on a device; int32 has the same bits."""

LARGEST_N = 2**32 - 1
"""Elements of the longest stream."""

WORDS = 8
"""Words of a stream of strength 256."""


def check_seeds(seeds: Seeds) -> UInts:
    """Return seeds in any accepted form as a contiguous array, uint32 ``[B, S]``."""
    try:
        array = np.asarray(seeds)
    except (ValueError, TypeError, OverflowError):
        array = np.asarray(None)  # refused below
    # Numpy makes float64 of an empty list.
    if array.size == 0 and array.ndim == 1:
        array = array.astype(np.uint32)
    if array.ndim == 1:
        array = array[:, None]
    well_formed = array.dtype.kind in "iu" and array.ndim == 2 and array.shape[1] > 0
    if not well_formed or (
        array.size and not 0 <= int(array.min()) <= int(array.max()) <= 0xFFFFFFFF
    ):
        raise UsageError(
            f"seeds {seeds!r:.80}",
            wanted="integers from 0 to 4294967295, of shape [B] or [B, S]",
            do="make them with assay.streams.seeds(texts)",
            field="seeds",
        )
    return np.ascontiguousarray(array, dtype=np.uint32)


def check_plain_seeds(seeds: Seeds) -> UInts:
    """Return one seed for each stream as a contiguous array, uint32 ``[B]``."""
    seeds_BS = check_seeds(seeds)
    if seeds_BS.shape[1] != 1:
        raise UsageError(
            f"{seeds_BS.shape[1]} sub-seeds for each stream",
            wanted="one seed for each stream: only normals take more",
            do="make the seeds with strength=32",
            field="strength",
        )
    return np.ascontiguousarray(seeds_BS[:, 0])


def check_count(value: int, name: str = "n") -> int:
    """Return a number of elements as an int from 0 to :data:`LARGEST_N`."""
    try:
        count = operator.index(value)
    except TypeError as error:
        raise UsageError(
            f"{name} = {value!r}", wanted="an integer", do=f"pass {name} as int", field=name
        ) from error
    if not 0 <= count <= LARGEST_N:
        raise UsageError(
            f"{name} = {count}",
            wanted=f"{name} from 0 to {LARGEST_N}",
            do="use several seed texts for more elements",
            field=name,
        )
    return count


def check_tensor(
    name: str, tensor: torch.Tensor, device: str, dtypes: tuple[str, ...], axes: int
) -> None:
    """Refuse a tensor of another dtype, number of axes or device."""
    import torch

    dtype = dtype_name(tensor.dtype)
    kind, _, number = device.partition(":")
    on_device = kind == tensor.device.type
    # Without a number it is the current device.
    if on_device and kind == "cuda":
        on_device = tensor.device.index == (int(number) if number else torch.cuda.current_device())
    if dtype not in dtypes or tensor.ndim != axes or not on_device:
        unit = "axis" if axes == 1 else "axes"
        raise UsageError(
            f"{name} of dtype {dtype} and shape {tuple(tensor.shape)} on {tensor.device}",
            wanted=f"{' or '.join(dtypes)} with {axes} {unit} on {device}",
            do="convert it, or take the backend of its device",
            field=name,
        )


def check_scores(
    device: str, scores: torch.Tensor, seeds: torch.Tensor, rows: torch.Tensor | None
) -> None:
    """Refuse scores, seeds and row numbers that do not belong together.

    Row numbers are read only on the CPU, since reading them would wait for a GPU.
    """
    check_tensor("scores", scores, device, ("float32",), 2)
    count, columns = scores.shape
    if (columns > 1 and scores.stride(1) != 1) or (count > 1 and scores.stride(0) < columns):
        raise UsageError(
            f"scores of shape {tuple(scores.shape)} and strides {scores.stride()}",
            wanted="rows that are contiguous and do not overlap",
            do="call .contiguous() on the scores and add the noise to that",
            field="scores",
        )
    check_tensor("seeds", seeds, device, SEED_DTYPES, 1)
    if rows is not None:
        check_tensor("rows", rows, device, ("int64",), 1)
        # On a GPU a look at the numbers would wait for the device; its kernel skips such rows.
        if rows.device.type == "cpu" and len(rows):
            first = int(rows.min())
            last = int(rows.max())
            if first < 0 or last >= count:
                raise UsageError(
                    f"rows from {first} to {last} of {count}",
                    wanted=f"rows from 0 to {count - 1}",
                    do="number the rows of the scores from 0",
                    field="rows",
                )
        count = len(rows)
    if len(seeds) != count:
        raise UsageError(
            f"{len(seeds)} seeds for {count} rows",
            wanted="one seed for each row",
            do="name the rows that get noise in rows_N",
            field="seeds",
        )
