"""The decompositions of all target matrices of a model, kept in memory and, if wanted, on disk.

On disk every matrix has a file of its own, ``{directory}/svd/{key}.safetensors``, with ``left``, ``values`` and
``right`` and their measured errors. The key is a SHA-256 over the content of the matrix, the dtype of the factors and
the method, so a matrix that training has changed is never confused with what it was, and models that share matrices
share files.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from assay.errors import BadWeights, UsageError
from assay.reports import storage_error, write_atomic
from assay.streams import torch_dtype
from assay.vhack.gradients._digest import tensor_digest
from assay.vhack.gradients._svd import Factors, factorise
from assay.vhack.gradients._targets import MIN_COVERAGE, check_coverage, target_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from assay.models import Model

Progress = Callable[[int, int], None]

_FORMAT = "assay.svd/1"
_DTYPES = ("float32", "bfloat16")
# A GPU decomposes several matrices at once: the eigensolver alone does not fill it.
_STREAMS = 4


class SVDCache(Mapping[str, Factors]):
    """Factors of every target matrix of a model, by module name.

    Attributes:
        rank: Number of singular directions that were kept, or None for all.
        dtype: Dtype of the factors U and Vh.
    """

    def __init__(self, factors: Mapping[str, Factors], *, rank: int | None, dtype: torch.dtype) -> None:
        self._factors = dict(factors)
        self.rank = rank
        self.dtype = dtype

    def __getitem__(self, name: str) -> Factors:
        return self._factors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def truncated(self, rank: int) -> "SVDCache":
        """Return the ``rank`` strongest singular directions of every matrix.

        Raises:
            UsageError: The rank is below 1.
        """
        check_rank(rank)
        kept = {name: factors.truncated(rank) for name, factors in self.items()}
        return SVDCache(kept, rank=rank, dtype=self.dtype)


def weight_svd(
    model: "Model | PreTrainedModel",
    *,
    rank: int | None = None,
    dtype: str | None = None,
    method: str = "auto",
    cache: Path | None = None,
    min_coverage: float = MIN_COVERAGE,
    progress: Progress | None = None,
) -> SVDCache:
    """Decompose every target matrix of a model.

    Args:
        model: Model whose target matrices are decomposed; the factors stay on the device of their matrix.
        rank: Number of singular directions to keep per matrix, the strongest first; None keeps all.
        dtype: Dtype of the factors, ``"float32"`` or ``"bfloat16"``; None is bfloat16 for a bfloat16 model on a GPU,
            where it halves memory and time, and float32 otherwise.
        method: Algorithm: ``"exact"``, ``"gram"``, or ``"auto"``, which is gram on a GPU and exact on a CPU.
        cache: Directory of the files on disk; None keeps nothing there.
        min_coverage: Share of the model's weights, embeddings and head aside, that the target matrices must be.
        progress: Function called with the number of matrices done and of all.

    Raises:
        UsageError: The dtype or the method has another name, or the rank is below 1.
        ModelError: The model has no target projection, fused experts, or too many weights that are no targets.
        BadWeights: A matrix is not finite; the message names it.
        StorageError: A file cannot be written.
    """
    modules = target_modules(model)
    chosen = factor_dtype(dtype, next(iter(modules.values())).weight)
    _check(method, rank)
    check_coverage(model, min_coverage)

    def one(item: tuple[str, torch.nn.Linear]) -> tuple[str, Factors]:
        name, module = item
        factors = _load_or_make(name, module.weight, chosen, method, cache)
        return name, factors if rank is None else factors.truncated(rank)

    found: dict[str, Factors] = {}
    for name, factors in _side_by_side(one, modules, next(iter(modules.values())).weight.device):
        found[name] = factors
        if progress:
            progress(len(found), len(modules))
    return SVDCache(found, rank=rank, dtype=chosen)


def _side_by_side(
    one: Callable[[tuple[str, torch.nn.Linear]], tuple[str, Factors]],
    modules: Mapping[str, torch.nn.Linear],
    device: torch.device,
) -> Iterator[tuple[str, Factors]]:
    """Decompose several matrices at once, in the order of the modules."""
    if device.type != "cuda":
        # One matrix per core: threads that share a small matrix mostly wait for each other.
        cores = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(cores) as pool:
                yield from pool.map(one, modules.items())
        finally:
            torch.set_num_threads(cores)
        return

    def on_stream(item: tuple[str, torch.nn.Linear]) -> tuple[str, Factors]:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device), torch.cuda.stream(stream):
            result = one(item)
            stream.synchronize()
        return result

    # The first call of the library loads it, which must not happen in several threads at once.
    torch.linalg.eigh(torch.eye(2, dtype=torch.float64, device=device))
    torch.cuda.synchronize(device)
    with ThreadPoolExecutor(_STREAMS) as pool:
        yield from pool.map(on_stream, modules.items())


def factor_dtype(name: str | None, weight: Tensor) -> torch.dtype:
    """Return the dtype of the factors of a weight: the one that is named, or the default of :func:`weight_svd`."""
    if name is None:
        return torch.bfloat16 if weight.is_cuda and weight.dtype == torch.bfloat16 else torch.float32
    if name not in _DTYPES:
        raise UsageError(f"factors in {name!r}", wanted=" or ".join(_DTYPES), do="choose one of them, or leave it out")
    return torch_dtype(name)


def _check(method: str, rank: int | None) -> None:
    if method not in ("auto", "exact", "gram"):
        raise UsageError(f"method={method!r} of the SVD", wanted="auto, exact or gram", do="choose one of them")
    check_rank(rank)


def check_rank(rank: int | None) -> None:
    """Raise UsageError unless ``rank`` is None or at least 1."""
    if rank is not None and rank < 1:
        raise UsageError(f"rank={rank}", wanted="at least 1", do="ask for 1 or more, or leave it out for all")


def _load_or_make(name: str, weight: Tensor, dtype: torch.dtype, method: str, cache: Path | None) -> Factors:
    path = None
    if cache is not None:
        key = hashlib.sha256(f"{_FORMAT}\n{tensor_digest(weight)}\n{dtype}\n{method}".encode()).hexdigest()
        path = cache / "svd" / f"{key}.safetensors"
        stored = _read(path, weight, dtype)
        if stored is not None:
            return stored
    try:
        factors = factorise(weight, dtype=dtype, method=method)
    except BadWeights as error:
        raise BadWeights(f"{name}: {error.seen}", wanted=error.wanted, do=error.do) from error
    if path is not None:
        _write(path, factors)
    return factors


def _read(path: Path, weight: Tensor, dtype: torch.dtype) -> Factors | None:
    """Return the factors in a file, or None where there is no whole file of this matrix; it is then written again."""
    try:
        with safe_open(path, framework="pt") as reader:
            metadata = reader.metadata() or {}
            left, values, right = (reader.get_tensor(name).to(weight.device) for name in ("left", "values", "right"))
            found = Factors(left, values, right, float(metadata["residual"]), float(metadata["orthogonality"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    rank = min(weight.shape)
    fits = (left.shape, values.shape, right.shape) == ((weight.shape[0], rank), (rank,), (rank, weight.shape[1]))
    finite = all(bool(torch.isfinite(part).all()) for part in (left, values, right))
    return found if fits and finite and left.dtype == right.dtype == dtype else None


def _write(path: Path, factors: Factors) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(path.parent, error) from error
    tensors = {"left": factors.left, "values": factors.values, "right": factors.right}
    metadata = {"residual": repr(factors.residual), "orthogonality": repr(factors.orthogonality), "format": _FORMAT}
    write_atomic(path, save({name: tensor.cpu() for name, tensor in tensors.items()}, metadata=metadata))
