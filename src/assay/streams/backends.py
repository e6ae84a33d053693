"""What every backend is: checked arguments in front, one generator per kind of stream behind.

The generators here are the definition itself. Every other backend replaces them by faster ones.

Shapes: ``B`` streams of a batch, ``n`` or ``N`` elements of each, ``S`` sub-seeds of a stream.
Where noise is added to scores: ``N`` rows that get it, of ``R`` rows and ``V`` columns.
"""

from __future__ import annotations

import importlib
import operator
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from assay.errors import (
    BackendUnavailable,
    OutOfMemory,
    UsageError,
    check_choice,
    is_out_of_memory,
)
from assay.streams import definition
from assay.streams.arrays import DTYPES, Array, as_tensor, dtype_name, torch_dtype
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

BACKENDS = ("numpy", "torch", "triton")
"""Names of the backends: the definition, torch on CPU and CUDA, and fused CUDA kernels."""


class Backend:
    """The streams on one device, here by the numpy definition; every backend has the same bits.

    ``numpy`` returns numpy arrays, and tensors for bfloat16, which numpy lacks; ``torch`` and
    ``triton`` return tensors on their device. All streams of a batch are made in one call.

    Every method raises :class:`~assay.errors.UsageError` for seeds that are not integers in [0,
    2**32) of the shape it names, and for ``n`` outside [0, 2**32); and
    :class:`~assay.errors.OutOfMemory` when the result does not fit.
    """

    name = "numpy"

    def __init__(self, device: str) -> None:
        self.device = device

    def hashes(self, seeds_B: Seeds, n: int) -> Array:
        """Return the first n hashes of each stream, uint32 ``[B, n]``."""
        return self._make("hashes", seeds_B, n)

    def uniforms(self, seeds_B: Seeds, n: int) -> Array:
        """Return the first n uniforms of each stream, float32 ``[B, n]``, in [0, 1].

        Both ends occur.
        """
        return self._make("uniforms", seeds_B, n)

    def signs(self, seeds_B: Seeds, n: int) -> Array:
        """Return n signs of each stream, int8 ``[B, n]``: +1 where the uniform is above 0.5."""
        return self._make("signs", seeds_B, n)

    def permutations(self, seeds_B: Seeds, n: int) -> Array:
        """Return a permutation of 0..n-1 for each stream, int64 ``[B, n]``.

        It is the stable argsort of the stream's hashes.
        """
        return self._make("permutations", seeds_B, n)

    def picks(self, seeds_B: Seeds, n: int, k: int) -> Array:
        """Choose k indices below n for each stream, int64 ``[B, k]``.

        They are those of the k smallest hashes, smallest first.

        Raises:
            UsageError: Also when k is negative or above n.
        """
        n = _check_count(n)
        k = _check_count(k, "k")
        if k > n:
            raise UsageError(
                f"k = {k} of n = {n}",
                wanted="k from 0 to n",
                do="pick at most as many as there are",
                field="k",
            )
        with self._memory_for(n):
            return self._picks(_check_plain_seeds(seeds_B), n, k)

    def normals(self, seeds_BS: Seeds, n: int, dtype: str = "float32") -> Array:
        """Generate n standard normals for each stream, ``[B, n]``; every value depends on n.

        So they are **not** prefix-stable. With S sub-seeds each generates ``ceil(n / S)`` values by
        its own Box-Muller (the last ones the remainder), one after the other. Plain seeds ``[B]``
        are the case S = 1.

        Raises:
            UsageError: Also when the dtype is not one of :data:`assay.streams.DTYPES`.
        """
        check_choice("dtype", dtype, DTYPES, "dtype")
        with self._memory_for(n):
            return self._normals(_check_seeds(seeds_BS), _check_count(n), dtype)

    def gumbels(self, seeds_B: Seeds, n: int) -> Array:
        """Return the first n standard Gumbel numbers of each stream, float32 ``[B, n]``.

        They lie from -3.13 to 22.87. The token with the largest sum of logit and number is a sample
        of the softmax of the logits.
        """
        return self._make("gumbels", seeds_B, n)

    def add_gumbels(self, scores_RV: Array, seeds_N: Array, rows_N: Array | None = None) -> None:
        """Add the Gumbel numbers of a stream to every row, in place.

        Column v of a row gets element v of its stream, by one float32 addition; a token that is
        forbidden by minus infinity stays forbidden. On a GPU the call returns without waiting for
        the device and reads nothing back, so ``add_gumbels(logits, row_seeds(words, steps))`` can
        be part of every step of decoding.

        Args:
            scores_RV: float32, on the backend's device, contiguous within a row.
            seeds_N: One seed for each row, uint32 or int32 with the same bits, on the same device.
            rows_N: Different rows of the scores, int64, on the same device: seed i is for row
                ``rows_N[i]``, and the other rows stay as they are. None if every row has its seed.

        Raises:
            UsageError: A shape, dtype or device is wrong, or a row does not exist (not checked on a
                GPU).
        """
        scores = as_tensor(scores_RV).detach()
        seeds = as_tensor(seeds_N)
        rows = None if rows_N is None else as_tensor(rows_N).contiguous()
        _check_scores(self.device, scores, seeds, rows)
        if len(seeds) and scores.shape[1]:
            with self._memory_for(scores.shape[1]):
                self._add_gumbels(scores, _as_int32(seeds), rows)

    def row_seeds(self, words_N8: Array, steps_N: Array) -> torch.Tensor:
        """Return the seed of one step for each row, uint32 ``[N]``, as a tensor on the device.

        Seed i is ``step_seeds(words_N8[i : i + 1], steps_N[i : i + 1])`` of
        :func:`assay.streams.step_seeds`. The call does not wait for the device.

        Args:
            words_N8: The 8 words of each row's stream, uint32 or int32 with the same bits, on the
                backend's device.
            steps_N: A step of each, from 0 to 2**32 - 1, as int64, int32 or uint32, on the same
                device.

        Raises:
            UsageError: A shape, dtype or device is wrong.
        """
        words = as_tensor(words_N8)
        steps = as_tensor(steps_N)
        _check_tensor("words", words, self.device, SEED_DTYPES, 2)
        _check_tensor("steps", steps, self.device, ("int64", *SEED_DTYPES), 1)
        if words.shape != (len(steps), WORDS):
            raise UsageError(
                f"words of shape {tuple(words.shape)} for {len(steps)} steps",
                wanted=f"{WORDS} words for each step",
                do="repeat the words of a stream for each of its steps",
                field="words",
            )
        return self._row_seeds(_as_int32(words), _as_int32(steps)).view(torch_dtype("uint32"))

    def reflected(self, x_BD: torch.Tensor, seeds_BR: Seeds) -> torch.Tensor | None:
        """Reflect every row in R random hyperplanes in turn: ``x - 2 (x v) / (v v) v``, v normal.

        The normals are those of :meth:`normals`, D of each seed. The sums are float32 in the
        backend's own order: results differ by rounding, about 1e-7 of the length of a row, from
        the same formula elsewhere.

        Args:
            x_BD: float32, on the backend's device.
            seeds_BR: R seeds for each row.

        Returns:
            The reflected rows, float32 ``[B, D]``; None if this backend has no fused kernel for
            them.

        Raises:
            UsageError: Also when there are not as many rows as rows of seeds.
        """
        checked_BR = _check_seeds(seeds_BR)
        if x_BD.ndim != 2 or len(x_BD) != len(checked_BR):
            raise UsageError(
                f"an array of shape {tuple(x_BD.shape)} and seeds of {len(checked_BR)} rows",
                wanted="rows [B, D] and seeds [B, R]",
                do="give every row its own seeds",
                field="seeds",
            )
        with self._memory_for(x_BD.shape[1]):
            return self._reflected(x_BD, checked_BR)

    def _make(self, kind: str, seeds_B: Seeds, n: int) -> Array:
        with self._memory_for(n):
            return self._generate(kind, _check_plain_seeds(seeds_B), _check_count(n))

    @contextmanager
    def _memory_for(self, n: int) -> Iterator[None]:
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

    def _generate(self, kind: str, seeds_B: UInts, n: int) -> Array:
        """Return the first n numbers of a kind, which is the name of a public method."""
        bounds = (n,) if kind in ("signs", "permutations") else (0, n)
        numbers: Array = getattr(definition, kind)(seeds_B, *bounds)
        return numbers

    def _picks(self, seeds_B: UInts, n: int, k: int) -> Array:
        return definition.picks(seeds_B, n, k)

    def _normals(self, seeds_BS: UInts, n: int, dtype: str) -> Array:
        values = definition.normals(seeds_BS, n)
        if dtype == "bfloat16":
            return as_tensor(values).to(torch_dtype(dtype))
        return values.astype(dtype, copy=False)

    def _add_gumbels(
        self, scores_RV: torch.Tensor, seeds_N: torch.Tensor, rows_N: torch.Tensor | None
    ) -> None:
        seeds = seeds_N.numpy().view(np.uint32)
        rows = slice(None) if rows_N is None else rows_N.numpy()
        scores_RV.numpy()[rows] += definition.gumbels(seeds, 0, scores_RV.shape[1])

    def _row_seeds(self, words_N8: torch.Tensor, steps_N: torch.Tensor) -> torch.Tensor:
        words = words_N8.numpy().view(np.uint32)
        steps = steps_N.numpy().view(np.uint32)
        return as_tensor(definition.step_seeds(words, steps[:, None])[:, 0].view(np.int32))

    def _reflected(self, x_BD: torch.Tensor, seeds_BR: UInts) -> torch.Tensor | None:
        return None


def _as_int32(integers: torch.Tensor) -> torch.Tensor:
    """Return integers as contiguous int32 with the same low 32 bits."""
    import torch

    if integers.dtype == torch.uint32:
        integers = integers.view(torch.int32)
    return integers.to(torch.int32).contiguous()


def step_seeds(words_B8: Seeds, steps_N: Seeds) -> UInts:
    """Return the 32-bit seed of every step of every stream of strength 256, uint32 ``[B, N]``.

    A response takes its noise from one stream of 8 words and has a seed of its own for every token:
    prefix-stable, different for every step, and equal on every machine.

    Args:
        words_B8: The words of each stream, as ``seeds(texts, strength=256)`` makes them.
        steps_N: Steps, integers in [0, 2**32).

    Raises:
        UsageError: A shape or value is wrong.

    Example:
        >>> from assay.streams import seeds, step_seeds
        >>> step_seeds(seeds(["a response"], strength=256), [0, 1]).shape
        (1, 2)
    """
    words = _check_seeds(words_B8)
    steps = _check_seeds(steps_N)
    if words.shape[1] != WORDS or steps.shape[1] != 1:
        raise UsageError(
            f"words of shape {words.shape} and steps of shape {np.shape(steps_N)}",
            wanted=f"{WORDS} words for each stream [B, {WORDS}], and steps [N]",
            do="make the words with assay.streams.seeds(texts, strength=256)",
            field="words",
        )
    return definition.step_seeds(words, steps.T)


def get_backend(name: str = "auto", device: str = "cpu") -> Backend:
    """Return the backend of that name on a device.

    Args:
        name: One of :data:`BACKENDS`, or ``auto``: ``torch``, and on CUDA ``triton`` where it runs.
        device: ``cpu``, ``cuda`` or ``cuda:<number>``.

    Raises:
        UsageError: An unknown name or device, or a device that the backend is not made for.
        BackendUnavailable: The backend, or its device, is not on this machine.
    """
    check_choice("backend", name, ("auto", *BACKENDS), "name")
    device = str(device)
    # Torch reads a number that it cannot hold as another one, or not at all.
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", device):
        raise UsageError(
            f"device {device!r}",
            wanted="cpu, cuda or cuda:<number>",
            do="choose one of these",
            field="device",
        )
    if name == "numpy":
        if device != "cpu":
            raise UsageError(
                f"backend numpy on device {device!r}",
                wanted="device cpu",
                do="use backend auto there",
                field="device",
            )
        return Backend(device)
    if name == "auto":
        try:
            return get_backend("torch" if device == "cpu" else "triton", device)
        except BackendUnavailable:
            return get_backend("torch", device)
    try:
        module = importlib.import_module(f"assay.streams.{name}_backend")
    except ImportError as error:
        raise BackendUnavailable(
            f"backend {name}: {error}",
            wanted=f"the packages of backend {name}; triton comes with the CUDA builds of torch",
            do="use backend auto, which takes the fastest one that is installed",
        ) from error
    backend: Backend = getattr(module, f"{name.capitalize()}Backend")(device)
    return backend


def _check_seeds(seeds: Seeds) -> UInts:
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


def _check_plain_seeds(seeds: Seeds) -> UInts:
    """Return one seed for each stream as a contiguous array, uint32 ``[B]``."""
    seeds_BS = _check_seeds(seeds)
    if seeds_BS.shape[1] != 1:
        raise UsageError(
            f"{seeds_BS.shape[1]} sub-seeds for each stream",
            wanted="one seed for each stream: only normals take more",
            do="make the seeds with strength=32",
            field="strength",
        )
    return np.ascontiguousarray(seeds_BS[:, 0])


def _check_count(value: int, name: str = "n") -> int:
    """Return a number of elements as an int from 0 to :data:`LARGEST_N`."""
    try:
        count = operator.index(value)
    except TypeError:
        count = -1  # refused below
    if not 0 <= count <= LARGEST_N:
        raise UsageError(
            f"{name} = {value!r}",
            wanted=f"an integer from 0 to {LARGEST_N}",
            do=f"pass {name} as int; use several seed texts for more elements",
            field=name,
        )
    return count


def _check_tensor(
    name: str, tensor: torch.Tensor, device: str, dtypes: tuple[str, ...], axes: int
) -> None:
    """Refuse a tensor of another dtype, number of axes or device."""
    dtype = dtype_name(tensor.dtype)
    kind, _, number = device.partition(":")
    on_device = kind == tensor.device.type
    # Without a number it is the current device.
    if on_device and kind == "cuda":
        import torch

        on_device = tensor.device.index == (int(number) if number else torch.cuda.current_device())
    if dtype not in dtypes or tensor.ndim != axes or not on_device:
        unit = "axis" if axes == 1 else "axes"
        raise UsageError(
            f"{name} of dtype {dtype} and shape {tuple(tensor.shape)} on {tensor.device}",
            wanted=f"{' or '.join(dtypes)} with {axes} {unit} on {device}",
            do="convert it, or take the backend of its device",
            field=name,
        )


def _check_scores(
    device: str, scores: torch.Tensor, seeds: torch.Tensor, rows: torch.Tensor | None
) -> None:
    """Refuse scores, seeds and row numbers that do not belong together.

    Row numbers are read only on the CPU, since reading them would wait for a GPU.
    """
    _check_tensor("scores", scores, device, ("float32",), 2)
    count, columns = scores.shape
    if (columns > 1 and scores.stride(1) != 1) or (count > 1 and scores.stride(0) < columns):
        raise UsageError(
            f"scores of shape {tuple(scores.shape)} and strides {scores.stride()}",
            wanted="rows that are contiguous and do not overlap",
            do="call .contiguous() on the scores and add the noise to that",
            field="scores",
        )
    _check_tensor("seeds", seeds, device, SEED_DTYPES, 1)
    if rows is not None:
        _check_tensor("rows", rows, device, ("int64",), 1)
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
