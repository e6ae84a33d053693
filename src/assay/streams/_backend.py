"""What every backend is: checked arguments in front, one generator per kind of stream behind.

The generators here are the definition itself. Every other backend replaces them by faster ones.

Shapes: ``B`` streams of a batch, ``n`` or ``N`` elements of each, ``S`` sub-seeds of a stream. Where noise is added to
scores: ``N`` rows that get it, of ``R`` rows and ``V`` columns.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from assay.errors import OutOfMemory, UsageError, is_out_of_memory
from assay.streams import _definition as definition
from assay.streams._arrays import DTYPES, Array, as_tensor, numpy_dtype, torch_dtype
from assay.streams._definition import UInts
from assay.streams._rows import WORDS, as_int32, check_rows, check_steps

if TYPE_CHECKING:
    import torch

Seeds: TypeAlias = Sequence[int] | Sequence[Sequence[int]] | npt.NDArray[Any]
"""32-bit seeds: ``[B]``, or ``[B, S]`` with S sub-seeds for each stream, as :func:`assay.streams.seeds` makes them."""

MAX_N = 2**32 - 1


class Backend:
    """The streams on one device. This class makes them plainly, with numpy; every backend gives the same bits.

    ``numpy`` and ``numba`` return numpy arrays (bfloat16 as :data:`ml_dtypes.bfloat16`); ``torch`` and ``triton``
    return tensors on their device, of the dtypes of the same names. All streams of a batch are made in one call.

    Every method raises :class:`~assay.errors.UsageError` for seeds that are not integers in [0, 2**32) of the shape it
    names, and for ``n`` outside [0, 2**32); and :class:`~assay.errors.OutOfMemory` when the result does not fit.
    """

    name = "numpy"

    def __init__(self, device: str) -> None:
        self.device = device

    def hashes(self, seeds_B: Seeds, n: int) -> Array:
        """Return the first n hashes of each stream, uint32 ``[B, n]``."""
        with self._room_for(n):
            return self._hashes(_single(seeds_B), _count(n))

    def uniforms(self, seeds_B: Seeds, n: int) -> Array:
        """Return the first n uniforms of each stream, float32 ``[B, n]``, in [0, 1] with both ends possible."""
        with self._room_for(n):
            return self._uniforms(_single(seeds_B), _count(n))

    def signs(self, seeds_B: Seeds, n: int) -> Array:
        """Return the first n signs of each stream, int8 ``[B, n]``: +1 where the uniform is above 0.5, else -1."""
        with self._room_for(n):
            return self._signs(_single(seeds_B), _count(n))

    def permutations(self, seeds_B: Seeds, n: int) -> Array:
        """Return a permutation of 0..n-1 for each stream, int64 ``[B, n]``: the stable argsort of its hashes."""
        with self._room_for(n):
            return self._permutations(_single(seeds_B), _count(n))

    def picks(self, seeds_B: Seeds, n: int, k: int) -> Array:
        """Choose k indices below n for each stream, int64 ``[B, k]``: those of the k smallest hashes, smallest first.

        Raises:
            UsageError: Also when k is negative or above n.
        """
        n, k = _count(n), _index(k, "k")
        if not 0 <= k <= n:
            raise UsageError(f"k = {k} of n = {n}", wanted="k from 0 to n", do="pick at most as many as there are")
        with self._room_for(n):
            return self._picks(_single(seeds_B), n, k)

    def normals(self, seeds_BS: Seeds, n: int, dtype: str = "float32") -> Array:
        """Generate n standard normals for each stream, ``[B, n]``. **Not** prefix-stable: every value depends on n.

        With S sub-seeds each generates ``ceil(n / S)`` values by its own Box-Muller (the last ones what is left), one
        after the other. Plain seeds ``[B]`` are the case S = 1.

        Raises:
            UsageError: Also when the dtype is not one of :data:`assay.streams.DTYPES`.
        """
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r}", wanted=f"one of {', '.join(DTYPES)}", do="name the dtype as a string")
        with self._room_for(n):
            return self._normals(_checked(seeds_BS), _count(n), dtype)

    def gumbels(self, seeds_B: Seeds, n: int) -> Array:
        """Return the first n standard Gumbel numbers of each stream, float32 ``[B, n]``, from -3.13 to 22.87.

        The token with the largest sum of logit and number is a sample of the softmax of the logits.
        """
        with self._room_for(n):
            return self._gumbels(_single(seeds_B), _count(n))

    def add_gumbels(self, scores_RV: Array, seeds_N: Array, rows_N: Array | None = None) -> None:
        """Add the Gumbel numbers of a stream to every row, in place.

        Column v of a row gets element v of its stream, by one float32 addition; a token that is forbidden by minus
        infinity stays forbidden. On a GPU the call returns without waiting for the device and reads nothing back, so
        ``add_gumbels(logits, row_seeds(words, steps))`` can be part of every step of decoding.

        Args:
            scores_RV: float32, on the backend's device, contiguous within a row.
            seeds_N: One seed for each row, uint32 or int32 with the same bits, on the same device.
            rows_N: Different rows of the scores, int64, on the same device: seed i is for row ``rows_N[i]``, and the
                other rows stay as they are. None if every row has its seed.

        Raises:
            UsageError: A shape, dtype or device is another one, or a row does not exist (not checked on a GPU).
        """
        scores, seeds = as_tensor(scores_RV).detach(), as_tensor(seeds_N)
        rows = None if rows_N is None else as_tensor(rows_N)
        check_rows(self.device, scores, seeds, rows)
        if len(seeds) and scores.shape[1]:
            with self._room_for(scores.shape[1]):
                self._add_gumbels(scores, as_int32(seeds), None if rows is None else rows.contiguous())

    def row_seeds(self, words_N8: Array, steps_N: Array) -> torch.Tensor:
        """Return the seed of one step for each row, uint32 ``[N]``, as a tensor on the device, without waiting for it.

        Seed i is ``step_seeds(words_N8[i : i + 1], steps_N[i : i + 1])`` of :func:`assay.streams.step_seeds`.

        Args:
            words_N8: The 8 words of each row's stream, uint32 or int32 with the same bits, on the backend's device.
            steps_N: A step of each, from 0 to 2**32 - 1, as int64, int32 or uint32, on the same device.

        Raises:
            UsageError: A shape, dtype or device is another one.
        """
        words, steps = as_tensor(words_N8), as_tensor(steps_N)
        check_steps(self.device, words, steps)
        return self._row_seeds(as_int32(words), as_int32(steps)).view(torch_dtype("uint32"))

    def reflected(self, x_BD: torch.Tensor, seeds_BR: Seeds) -> torch.Tensor | None:
        """Reflect every row in R hyperplanes drawn for it, one after the other: ``x - 2 (x v) / (v v) v``, v normal.

        The normals are those of :meth:`normals`, D of each seed. The sums are float32 in an order of the backend's own:
        results differ by rounding, about 1e-7 of the length of a row, from the same formula elsewhere.

        Args:
            x_BD: float32, on the backend's device.
            seeds_BR: R seeds for each row.

        Returns:
            The reflected rows, float32 ``[B, D]``; None if this backend has no fused kernel for them.

        Raises:
            UsageError: Also when there are not as many rows as rows of seeds.
        """
        checked_BR = _checked(seeds_BR)
        if x_BD.ndim != 2 or len(x_BD) != len(checked_BR):
            raise UsageError(
                f"an array of shape {tuple(x_BD.shape)} and seeds of {len(checked_BR)} rows",
                wanted="rows [B, D] and seeds [B, R]",
                do="give every row its own seeds",
            )
        with self._room_for(x_BD.shape[1]):
            return self._reflected(x_BD, checked_BR)

    @contextmanager
    def _room_for(self, n: int) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"streams of {n} elements do not fit on {self.device}",
                wanted="free memory for the whole batch",
                do="make fewer streams in one call",
            ) from error

    def _hashes(self, seeds_B: UInts, n: int) -> Array:
        return definition.hashes(seeds_B, 0, n)

    def _uniforms(self, seeds_B: UInts, n: int) -> Array:
        return definition.uniforms(seeds_B, 0, n)

    def _signs(self, seeds_B: UInts, n: int) -> Array:
        return definition.signs(seeds_B, n)

    def _permutations(self, seeds_B: UInts, n: int) -> Array:
        return definition.permutations(seeds_B, n)

    def _picks(self, seeds_B: UInts, n: int, k: int) -> Array:
        return definition.picks(seeds_B, n, k)

    def _normals(self, seeds_BS: UInts, n: int, dtype: str) -> Array:
        return definition.normals(seeds_BS, n).astype(numpy_dtype(dtype), copy=False)

    def _gumbels(self, seeds_B: UInts, n: int) -> Array:
        return definition.gumbels(seeds_B, 0, n)

    def _add_gumbels(self, scores_RV: torch.Tensor, seeds_N: torch.Tensor, rows_N: torch.Tensor | None) -> None:
        rows = slice(None) if rows_N is None else rows_N.numpy()
        scores_RV.numpy()[rows] += definition.gumbels(seeds_N.numpy().view(np.uint32), 0, scores_RV.shape[1])

    def _row_seeds(self, words_N8: torch.Tensor, steps_N: torch.Tensor) -> torch.Tensor:
        words, steps = words_N8.numpy().view(np.uint32), steps_N.numpy().view(np.uint32)
        return as_tensor(definition.step_seeds(words, steps[:, None])[:, 0].view(np.int32))

    def _reflected(self, x_BD: torch.Tensor, seeds_BR: UInts) -> torch.Tensor | None:
        return None


def tiles(rows: int, columns: int, size: int) -> list[tuple[int, int, int, int]]:
    """Cut a ``rows x columns`` grid into pieces of about ``size`` cells: ``(row, row_stop, column, column_stop)``."""
    width = max(1, min(columns, size))
    height = max(1, size // width)
    return [
        (row, min(row + height, rows), column, min(column + width, columns))
        for row in range(0, rows, height)
        for column in range(0, columns, width)
    ]


def step_seeds(words_B8: Seeds, steps_N: Seeds) -> UInts:
    """Return the 32-bit seed of every step of every stream of strength 256, uint32 ``[B, N]``.

    A response takes its noise from one stream of 8 words and has a seed of its own for every token: prefix-stable,
    different for every step, and equal on every machine.

    Args:
        words_B8: The words of each stream, as ``seeds(texts, strength=256)`` makes them.
        steps_N: Steps, integers in [0, 2**32).

    Raises:
        UsageError: Other shapes or values.

    Example:
        >>> from assay.streams import seeds, step_seeds
        >>> step_seeds(seeds(["a response"], strength=256), [0, 1]).shape
        (1, 2)
    """
    words, steps = _checked(words_B8), _checked(steps_N)
    if words.shape[1] != WORDS or steps.shape[1] != 1:
        raise UsageError(
            f"words of shape {words.shape} and steps of shape {np.shape(steps_N)}",
            wanted=f"{WORDS} words for each stream [B, {WORDS}], and steps [N]",
            do="make the words with assay.streams.seeds(texts, strength=256)",
        )
    return definition.step_seeds(words, steps.T)


def _single(seeds: Seeds) -> UInts:
    seeds_BS = _checked(seeds)
    if seeds_BS.shape[1] != 1:
        raise UsageError(
            f"{seeds_BS.shape[1]} sub-seeds for each stream",
            wanted="one seed for each stream: only normals take more",
            do="make the seeds with strength=32",
        )
    return np.ascontiguousarray(seeds_BS[:, 0])


def _checked(seeds: Seeds) -> UInts:
    """Return seeds in any accepted form as a contiguous ``seeds_BS``."""
    try:
        array = np.asarray(seeds)
    except (ValueError, TypeError, OverflowError) as error:
        raise _bad_seeds(seeds) from error
    if array.size == 0 and array.ndim == 1:
        array = array.astype(np.uint32)
    if array.ndim == 1:
        array = array[:, None]
    well_formed = array.dtype.kind in "iu" and array.ndim == 2 and array.shape[1] > 0
    if not well_formed or (array.size and not 0 <= int(array.min()) <= int(array.max()) <= 0xFFFFFFFF):
        raise _bad_seeds(seeds)
    return np.ascontiguousarray(array, dtype=np.uint32)


def _bad_seeds(seeds: object) -> UsageError:
    return UsageError(
        f"seeds {seeds!r:.80}",
        wanted="integers from 0 to 4294967295, of shape [B] or [B, S]",
        do="make them with assay.streams.seeds(texts)",
    )


def _count(n: int) -> int:
    number = _index(n, "n")
    if not 0 <= number <= MAX_N:
        raise UsageError(f"n = {number}", wanted=f"n from 0 to {MAX_N}", do="use several seed texts for more elements")
    return number


def _index(value: int, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise UsageError(f"{name} = {value!r}", wanted="an integer", do=f"pass {name} as int") from error
