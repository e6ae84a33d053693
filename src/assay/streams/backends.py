"""What every backend is: checked arguments in front, one generator per kind of stream behind.

The generators here are the definition itself. Every other backend replaces them by faster ones.

Shapes: ``B`` streams of a batch, ``n`` or ``N`` elements of each, ``S`` sub-seeds of a stream.
    Where noise is added to
scores: ``N`` rows that get it, of ``R`` rows and ``V`` columns.
"""

from __future__ import annotations

import hashlib
import importlib
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from assay.errors import BackendUnavailable, OutOfMemory, UsageError, is_out_of_memory
from assay.streams import definition
from assay.streams.definition import UInts, seeds

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "npt.NDArray[Any] | torch.Tensor"

DTYPES = ("float32", "float16", "bfloat16")
"""Formats of normals and of weights. The two short ones are the float32 values rounded once, to
nearest even.
"""


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of that name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch dtype, for example ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def as_tensor(array: Array) -> torch.Tensor:
    """Return a tensor over the memory of a numpy array, or the tensor that was given."""
    import torch

    return array if isinstance(array, torch.Tensor) else torch.from_numpy(array)


def digest(array: Array) -> str:
    """Return the SHA-256 (hex) of the elements as little-endian bytes in row-major order, equal for
    every backend.
    """
    if not isinstance(array, np.ndarray):
        tensor = array.detach().cpu()
        array = (
            tensor.view(torch_dtype("int16")).numpy()
            if dtype_name(tensor.dtype) == "bfloat16"
            else tensor.numpy()
        )
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return hashlib.sha256(little.reshape(-1).view(np.uint8).data).hexdigest()


WORDS = 8
"""Words of a stream of strength 256."""

_SEEDS = ("uint32", "int32")


def _check_rows(
    device: str, scores: torch.Tensor, seeds: torch.Tensor, rows: torch.Tensor | None
) -> None:
    """Check shapes, dtypes and devices; values only on the CPU, since reading them would wait for a
    GPU.
    """
    _check("scores", scores, device, ("float32",), 2)
    count, columns = scores.shape
    if (columns > 1 and scores.stride(1) != 1) or (count > 1 and scores.stride(0) < columns):
        seen = f"scores of shape {tuple(scores.shape)} and strides {scores.stride()}"
        do = "call .contiguous() on the scores and add the noise to that"
        raise UsageError(seen, wanted="rows that are contiguous and do not overlap", do=do)
    _check("seeds", seeds, device, _SEEDS, 1)
    if rows is not None:
        _check("rows", rows, device, ("int64",), 1)
        if (
            rows.device.type == "cpu"
            and len(rows)
            and not 0 <= int(rows.min()) <= int(rows.max()) < count
        ):
            seen = f"rows from {int(rows.min())} to {int(rows.max())} of {count}"
            raise UsageError(
                seen,
                wanted=f"rows from 0 to {count - 1}",
                do="number the rows of the scores from 0",
            )
    wanted = count if rows is None else len(rows)
    if len(seeds) != wanted:
        do = "name the rows that get noise in rows_N"
        raise UsageError(
            f"{len(seeds)} seeds for {wanted} rows", wanted="one seed for each row", do=do
        )


def _as_int32(integers: torch.Tensor) -> torch.Tensor:
    """Return integers as contiguous int32 with the same low 32 bits."""
    import torch

    if integers.dtype == torch.uint32:
        integers = integers.view(torch.int32)
    return integers.to(torch.int32).contiguous()


def _check(
    name: str, tensor: torch.Tensor, device: str, dtypes: tuple[str, ...], axes: int
) -> None:
    """Check a tensor; the device ``cuda`` without a number is the current one."""
    import torch

    dtype, (kind, _, number) = dtype_name(tensor.dtype), device.partition(":")
    there = kind == tensor.device.type
    if there and kind == "cuda":
        there = tensor.device.index == (int(number) if number else torch.cuda.current_device())
    if dtype not in dtypes or tensor.ndim != axes or not there:
        seen = f"{name} of dtype {dtype} and shape {tuple(tensor.shape)} on {tensor.device}"
        wanted = f"{' or '.join(dtypes)} with {axes} {'axis' if axes == 1 else 'axes'} on {device}"
        raise UsageError(seen, wanted=wanted, do="convert it, or take the backend of its device")


Seeds: TypeAlias = Sequence[int] | Sequence[Sequence[int]] | npt.NDArray[Any]
"""32-bit seeds: ``[B]``, or ``[B, S]`` with S sub-seeds for each stream, as
:func:`assay.streams.seeds` makes them.
"""

MAX_N = 2**32 - 1


class Backend:
    """The streams on one device. This class makes them plainly, with numpy; every backend gives the
    same bits.

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
        """Return the first n uniforms of each stream, float32 ``[B, n]``, in [0, 1] with both ends
        possible.
        """
        return self._make("uniforms", seeds_B, n)

    def signs(self, seeds_B: Seeds, n: int) -> Array:
        """Return the first n signs of each stream, int8 ``[B, n]``: +1 where the uniform is above
        0.5, else -1.
        """
        return self._make("signs", seeds_B, n)

    def permutations(self, seeds_B: Seeds, n: int) -> Array:
        """Return a permutation of 0..n-1 for each stream, int64 ``[B, n]``: the stable argsort of
        its hashes.
        """
        return self._make("permutations", seeds_B, n)

    def picks(self, seeds_B: Seeds, n: int, k: int) -> Array:
        """Choose k indices below n for each stream, int64 ``[B, k]``: those of the k smallest
        hashes, smallest first.

        Raises:
            UsageError: Also when k is negative or above n.
        """
        n = _count(n)
        k = _count(k, "k")
        if k > n:
            raise UsageError(
                f"k = {k} of n = {n}",
                wanted="k from 0 to n",
                do="pick at most as many as there are",
            )
        with self._room_for(n):
            return self._picks(_single(seeds_B), n, k)

    def normals(self, seeds_BS: Seeds, n: int, dtype: str = "float32") -> Array:
        """Generate n standard normals for each stream, ``[B, n]``. **Not** prefix-stable: every
        value depends on n.

        With S sub-seeds each generates ``ceil(n / S)`` values by its own Box-Muller (the last ones
        what is left), one after the other. Plain seeds ``[B]`` are the case S = 1.

        Raises:
            UsageError: Also when the dtype is not one of :data:`assay.streams.DTYPES`.
        """
        if dtype not in DTYPES:
            raise UsageError(
                f"dtype {dtype!r}",
                wanted=f"one of {', '.join(DTYPES)}",
                do="name the dtype as a string",
            )
        with self._room_for(n):
            return self._normals(_checked(seeds_BS), _count(n), dtype)

    def gumbels(self, seeds_B: Seeds, n: int) -> Array:
        """Return the first n standard Gumbel numbers of each stream, float32 ``[B, n]``, from -3.13
        to 22.87.

        The token with the largest sum of logit and number is a sample of the softmax of the logits.
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
            UsageError: A shape, dtype or device is another one, or a row does not exist (not
                checked on a GPU).
        """
        scores = as_tensor(scores_RV).detach()
        seeds = as_tensor(seeds_N)
        rows = None if rows_N is None else as_tensor(rows_N)
        _check_rows(self.device, scores, seeds, rows)
        if len(seeds) and scores.shape[1]:
            with self._room_for(scores.shape[1]):
                self._add_gumbels(
                    scores, _as_int32(seeds), None if rows is None else rows.contiguous()
                )

    def row_seeds(self, words_N8: Array, steps_N: Array) -> torch.Tensor:
        """Return the seed of one step for each row, uint32 ``[N]``, as a tensor on the device,
        without waiting for it.

        Seed i is ``step_seeds(words_N8[i : i + 1], steps_N[i : i + 1])`` of
        :func:`assay.streams.step_seeds`.

        Args:
            words_N8: The 8 words of each row's stream, uint32 or int32 with the same bits, on the
                backend's device.
            steps_N: A step of each, from 0 to 2**32 - 1, as int64, int32 or uint32, on the same
                device.

        Raises:
            UsageError: A shape, dtype or device is another one.
        """
        words = as_tensor(words_N8)
        steps = as_tensor(steps_N)
        _check("words", words, self.device, _SEEDS, 2)
        _check("steps", steps, self.device, ("int64", *_SEEDS), 1)
        if words.shape != (len(steps), WORDS):
            seen = f"words of shape {tuple(words.shape)}"
            do = "repeat the words of a stream for each of its steps"
            raise UsageError(
                f"{seen} for {len(steps)} steps", wanted=f"{WORDS} words for each step", do=do
            )
        return self._row_seeds(_as_int32(words), _as_int32(steps)).view(torch_dtype("uint32"))

    def reflected(self, x_BD: torch.Tensor, seeds_BR: Seeds) -> torch.Tensor | None:
        """Reflect every row in R hyperplanes drawn for it, one after the other: ``x - 2 (x v) / (v
        v) v``, v normal.

        The normals are those of :meth:`normals`, D of each seed. The sums are float32 in an order
        of the backend's own: results differ by rounding, about 1e-7 of the length of a row, from
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
        checked_BR = _checked(seeds_BR)
        if x_BD.ndim != 2 or len(x_BD) != len(checked_BR):
            seen = f"an array of shape {tuple(x_BD.shape)} and seeds of {len(checked_BR)} rows"
            raise UsageError(
                seen, wanted="rows [B, D] and seeds [B, R]", do="give every row its own seeds"
            )
        with self._room_for(x_BD.shape[1]):
            return self._reflected(x_BD, checked_BR)

    def _make(self, kind: str, seeds_B: Seeds, n: int) -> Array:
        with self._room_for(n):
            return self._generate(kind, _single(seeds_B), _count(n))

    @contextmanager
    def _room_for(self, n: int) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            wanted = "free memory for the whole batch"
            do = "make fewer streams in one call"
            raise OutOfMemory(
                f"streams of {n} elements do not fit on {self.device}", wanted=wanted, do=do
            ) from error

    def _generate(self, kind: str, seeds_B: UInts, n: int) -> Array:
        """Return the first n numbers of a kind, which is the name of a public method."""
        bounds = (n,) if kind in ("signs", "permutations") else (0, n)
        made: Array = getattr(definition, kind)(seeds_B, *bounds)
        return made

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
        rows = slice(None) if rows_N is None else rows_N.numpy()
        scores_RV.numpy()[rows] += definition.gumbels(
            seeds_N.numpy().view(np.uint32), 0, scores_RV.shape[1]
        )

    def _row_seeds(self, words_N8: torch.Tensor, steps_N: torch.Tensor) -> torch.Tensor:
        words = words_N8.numpy().view(np.uint32)
        steps = steps_N.numpy().view(np.uint32)
        return as_tensor(definition.step_seeds(words, steps[:, None])[:, 0].view(np.int32))

    def _reflected(self, x_BD: torch.Tensor, seeds_BR: UInts) -> torch.Tensor | None:
        return None


def tiles(rows: int, columns: int, size: int) -> list[tuple[int, int, int, int]]:
    """Cut a ``rows x columns`` grid into pieces of about ``size`` cells: ``(row, row_stop, column,
    column_stop)``.
    """
    width = max(1, min(columns, size))
    height = max(1, size // width)
    return [
        (row, min(row + height, rows), column, min(column + width, columns))
        for row in range(0, rows, height)
        for column in range(0, columns, width)
    ]


def step_seeds(words_B8: Seeds, steps_N: Seeds) -> UInts:
    """Return the 32-bit seed of every step of every stream of strength 256, uint32 ``[B, N]``.

    A response takes its noise from one stream of 8 words and has a seed of its own for every token:
    prefix-stable, different for every step, and equal on every machine.

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
    words = _checked(words_B8)
    steps = _checked(steps_N)
    if words.shape[1] != WORDS or steps.shape[1] != 1:
        wanted = f"{WORDS} words for each stream [B, {WORDS}], and steps [N]"
        do = "make the words with assay.streams.seeds(texts, strength=256)"
        raise UsageError(
            f"words of shape {words.shape} and steps of shape {np.shape(steps_N)}",
            wanted=wanted,
            do=do,
        )
    return definition.step_seeds(words, steps.T)


def _single(seeds: Seeds) -> UInts:
    seeds_BS = _checked(seeds)
    if seeds_BS.shape[1] != 1:
        wanted = "one seed for each stream: only normals take more"
        do = "make the seeds with strength=32"
        raise UsageError(f"{seeds_BS.shape[1]} sub-seeds for each stream", wanted=wanted, do=do)
    return np.ascontiguousarray(seeds_BS[:, 0])


def _checked(seeds: Seeds) -> UInts:
    """Return seeds in any accepted form as a contiguous ``seeds_BS``."""
    try:
        array = np.asarray(seeds)
    except (ValueError, TypeError, OverflowError):
        array = np.asarray(None)  # refused below
    if array.size == 0 and array.ndim == 1:
        array = array.astype(np.uint32)
    if array.ndim == 1:
        array = array[:, None]
    well_formed = array.dtype.kind in "iu" and array.ndim == 2 and array.shape[1] > 0
    if not well_formed or (
        array.size and not 0 <= int(array.min()) <= int(array.max()) <= 0xFFFFFFFF
    ):
        do = "make them with assay.streams.seeds(texts)"
        raise UsageError(
            f"seeds {seeds!r:.80}",
            wanted="integers from 0 to 4294967295, of shape [B] or [B, S]",
            do=do,
        )
    return np.ascontiguousarray(array, dtype=np.uint32)


def _count(value: int, name: str = "n") -> int:
    try:
        number = operator.index(value)
    except TypeError as error:
        raise UsageError(
            f"{name} = {value!r}", wanted="an integer", do=f"pass {name} as int"
        ) from error
    if not 0 <= number <= MAX_N:
        do = "use several seed texts for more elements"
        raise UsageError(f"{name} = {number}", wanted=f"{name} from 0 to {MAX_N}", do=do)
    return number


BACKENDS = ("numpy", "torch", "triton")
"""Names of the backends: the definition, torch on CPU and CUDA, and fused CUDA kernels."""


def get_backend(name: str = "auto", device: str = "cpu") -> Backend:
    """Return the backend of that name on a device.

    Args:
        name: One of :data:`BACKENDS`, or ``auto``: ``torch``, and on CUDA ``triton`` where it runs.
        device: ``cpu``, ``cuda`` or ``cuda:<number>``.

    Raises:
        UsageError: An unknown name or device, or a device that the backend is not made for.
        BackendUnavailable: The backend, or its device, is not on this machine.
    """
    if name not in (*BACKENDS, "auto"):
        raise UsageError(
            f"backend {name!r}",
            wanted=f"auto or one of {', '.join(BACKENDS)}",
            do="choose one of these",
        )
    device = str(device)
    # Torch reads a number that it cannot hold as another one, or not at all.
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", device):
        raise UsageError(
            f"device {device!r}", wanted="cpu, cuda or cuda:<number>", do="choose one of these"
        )
    if name == "numpy":
        if device != "cpu":
            raise UsageError(
                f"backend numpy on device {device!r}",
                wanted="device cpu",
                do="use backend auto there",
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
        wanted = f"the packages of backend {name}; triton comes with the CUDA builds of torch"
        do = "use backend auto, which takes the fastest one that is there"
        raise BackendUnavailable(f"backend {name}: {error}", wanted=wanted, do=do) from error
    backend: Backend = getattr(module, f"{name.capitalize()}Backend")(device)
    return backend


_TEXTS = [f"assay_selftest_{i}" for i in range(3)]
_N = 4097
_LARGE_N = 65537

SELFTEST_EXPECTED: Mapping[str, str] = {
    "hash": "23d018db47fab4326aa227a8c8a2a60734e8498506263145814a2a8da0695778",
    "uniform": "3f05a304d08f386ac5f37a8d2d3b2a26d4e445258af6313adf4886b5ef8530e8",
    "signs": "831ed7e5b7a2474d677b999b72a02eb05a523c92e1661d92a19e5db073470a4c",
    "permutation": "dd69ead6e84da1ffa6d70af372d4d913869e50c3a2568bd6c4c6b20da7ad3108",
    "pick 12": "f30de919f7b75f693d23aa734440224d260b94fb5631fac27c5c54dfdcccb86c",
    "gumbel": "261f9128b224efefbc9211d091d99ab64d0633f022131ea6f8219c8adaf0bd76",
    "normal float32": "188011b514762ed49cc6159ff404f1bfb20c4979d161c8ee4c90a4ad55c6ee8f",
    "normal float32 strength 256": "0b04710f9c4a0553053268fe6a9635d4538458340e30400aaa3902aef7472757",
    "normal float16": "ff7a53c089f10b5545f4c17618f5a944943febb7c755b5b8ea5fdf714c93571a",
    "normal float16 strength 256": "85799d51e221c62088cc1e1ecb90f084e4c036eb3e6928ca1f38d80b54905d01",
    "normal bfloat16": "dbaaa7594a4bc1f9a21b1e6bd5c4299fb3bbebedf7c0b550d5e28532cc1de3d7",
    "normal bfloat16 strength 256": "9ae6f63322b581edc4a157e74f9fbdd6536290bea082094db162e3dfe2a42096",
}
"""What :func:`selftest` returns on a machine that computes the streams as defined (made with the
numpy definition).
"""


def selftest(backend: Backend) -> dict[str, str]:
    """Return SHA-256 of three streams of every kind and dtype, by name: :data:`SELFTEST_EXPECTED`
    if all is right.

    Raises:
        OutOfMemory: The device has no room for a megabyte.
    """
    plain = seeds(_TEXTS)
    strong = seeds(_TEXTS, strength=256)
    streams = {
        "hash": backend.hashes(plain, _N),
        "uniform": backend.uniforms(plain, _N),
        "signs": backend.signs(plain, _N),
        "permutation": backend.permutations(plain, _N),
        "pick 12": backend.picks(plain, _N, 12),
        "gumbel": backend.gumbels(plain, _LARGE_N),
    }
    for dtype in DTYPES:
        streams[f"normal {dtype}"] = backend.normals(plain, _LARGE_N, dtype)
        streams[f"normal {dtype} strength 256"] = backend.normals(strong, _N, dtype)
    return {name: digest(stream) for name, stream in streams.items()}
