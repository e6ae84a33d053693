"""Singular value decompositions of target matrices, in float64, by LAPACK or Gram matrices.

``exact`` calls LAPACK. ``gram`` takes the eigenvectors of the smaller of ``WᵀW`` and ``W Wᵀ``,
which on a GPU is some ten times faster; squaring costs digits where singular values are small, so
the result is measured, repaired by a QR decomposition if it is not orthonormal enough, and given up
for ``exact`` if it still is not.

On disk every matrix has a file of its own, ``{directory}/svd/{key}.safetensors``, with ``left``,
``values`` and ``right`` and their measured errors. The key is a SHA-256 over the content of the
matrix, the dtype of the factors and the method, so a matrix that training has changed is never
confused with what it was, and models that share matrices share files.

Shapes: O outputs, I inputs, R = min(O, I), or fewer after truncation.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from assay.errors import BadWeights, DataError, UsageError, check_choice
from assay.files.storage import storage_error, write_atomic
from assay.files.tensors import check_tensors
from assay.models.device import one_thread
from assay.models.model import AnyModel
from assay.streams.arrays import torch_dtype
from assay.vhack.directions.gradients.batches import Progress
from assay.vhack.directions.gradients.division import division_of, gather_whole, loaded
from assay.vhack.directions.gradients.targets import (
    MIN_COVERAGE,
    check_coverage,
    chosen_modules,
    module_of,
    target_modules,
    tensor_digest,
)

_FORMAT = "assay.svd/1"
_DTYPES = ("float32", "bfloat16")
_METHODS = ("auto", "exact", "gram")
# A GPU decomposes several matrices at once, because the eigensolver alone does not fill it: the
# factors of a Qwen3-0.6B shape on an H200 take 1.8 s, and 2.5 s one after the other.
_STREAMS = 4

TOLERANCE = 1e-6
"""Largest residual and orthogonality that ``gram`` may have; rounding to float32 adds about as much
again.
"""


@dataclass(frozen=True, eq=False)
class Factors:
    """``W = left · diag(values) · right``.

    Attributes:
        left: Orthonormal columns U, [O, R].
        values: Singular values S in falling order, [R] float32.
        right: Orthonormal rows Vh, [R, I].
        residual: Error ‖U S Vh − W‖ / ‖W‖ in the Frobenius norm, measured in float64 before
            rounding to the dtype that is kept and before any truncation.
        orthogonality: Larger of ‖UᵀU − 1‖ and ‖Vh Vhᵀ − 1‖ in the Frobenius norm, measured
            likewise.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    residual: float
    orthogonality: float

    @property
    def rank(self) -> int:
        """Number of singular directions that are kept."""
        return len(self.values)

    def truncated(self, rank: int) -> "Factors":
        """Return the ``rank`` strongest directions, in memory of their own."""
        if rank >= self.rank:
            return self
        return replace(
            self,
            left=self.left[:, :rank].clone(),
            values=self.values[:rank].clone(),
            right=self.right[:rank].clone(),
        )


def factorise(
    weight_OI: Tensor, *, dtype: torch.dtype = torch.float32, method: str = "auto"
) -> Factors:
    """Decompose a weight matrix on the device it is on, in float64, into factors of a dtype.

    The method is ``"exact"``, ``"gram"``, or ``"auto"``, which is gram on a GPU and exact on a CPU.
    """
    wide_OI = weight_OI.detach().double()
    if not torch.isfinite(wide_OI).all():
        raise BadWeights(
            f"a weight matrix {list(weight_OI.shape)} holds NaN or infinity",
            wanted="finite weights",
            do="load the checkpoint again",
        )
    is_tall = wide_OI.shape[0] >= wide_OI.shape[1]
    tall = wide_OI if is_tall else wide_OI.T
    by_gram = method == "gram" or (method == "auto" and weight_OI.is_cuda)
    parts = _by_gram(tall) if by_gram else None
    if parts is None:
        parts = _measured(tall, *torch.linalg.svd(tall, full_matrices=False))
    if not is_tall:
        parts = replace(parts, left=parts.right.T, right=parts.left.T)
    return replace(
        parts,
        left=parts.left.to(dtype).contiguous(),
        values=parts.values.float(),
        right=parts.right.to(dtype).contiguous(),
    )


def _by_gram(tall: Tensor) -> Factors | None:
    """Return the factors of a tall matrix from its Gram matrix, or None if inaccurate."""
    vectors = torch.linalg.eigh(tall.T @ tall).eigenvectors.flip(1)
    scaled = tall @ vectors
    values = scaled.norm(dim=0)
    parts = _measured(
        tall, scaled / values.clamp_min(torch.finfo(values.dtype).tiny), values, vectors.T
    )
    if parts.orthogonality > TOLERANCE:
        left_columns, upper = torch.linalg.qr(scaled)
        signs = torch.where(upper.diagonal() < 0, -1.0, 1.0)
        parts = _measured(tall, left_columns * signs, upper.diagonal().abs(), vectors.T)
    accurate = parts.orthogonality <= TOLERANCE and parts.residual <= TOLERANCE
    return parts if accurate and bool((parts.values.diff() <= 0).all()) else None


def _measured(weight: Tensor, left_factor: Tensor, values: Tensor, right: Tensor) -> Factors:
    size = weight.norm()
    error = ((left_factor * values) @ right).sub_(weight).norm()
    return Factors(
        left_factor,
        values,
        right,
        residual=float(error / size if size > 0 else error),
        orthogonality=max(_skew(left_factor), _skew(right.T)),
    )


def _skew(columns: Tensor) -> float:
    product = columns.T @ columns
    product.diagonal().sub_(1)
    return float(product.norm())


class SVDCache(dict[str, Factors]):
    """Factors of every target matrix of a model, by module name.

    Attributes:
        rank: Number of singular directions that were kept, or None for all.
        dtype: Dtype of the factors U and Vh.
    """

    def __init__(
        self, factors: Mapping[str, Factors], *, rank: int | None, dtype: torch.dtype
    ) -> None:
        super().__init__(factors)
        self.rank = rank
        self.dtype = dtype


def factors_of(
    modules: Mapping[str, nn.Linear], factors: Mapping[str, Factors]
) -> dict[str, Factors]:
    """Return the factors of these modules; missing or misshapen ones are a UsageError."""
    factors_by_name = {}
    for name, linear in modules.items():
        # The factors of a matrix stay valid after PEFT has wrapped it.
        known = factors.get(name, factors.get(name.removesuffix(".base_layer")))
        shape = None if known is None else (known.left.shape[0], known.right.shape[1])
        if known is None or shape != tuple(linear.weight.shape):
            raise UsageError(
                f"factors of {name} for a matrix {shape}" if shape else f"no factors of {name}",
                wanted=f"factors of its weight, {list(linear.weight.shape)}",
                do="compute them with weight_svd of this very model",
            )
        factors_by_name[name] = known
    return factors_by_name


def weight_svd(
    model: AnyModel,
    *,
    modules: Collection[str] | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    method: str = "auto",
    cache: str | Path | None = None,
    min_coverage: float = MIN_COVERAGE,
    progress: Progress | None = None,
) -> SVDCache:
    """Decompose every target matrix of a model.

    Processes over which a model is divided call this together, and each keeps its share of the
    factors.

    Args:
        model: Model whose target matrices are decomposed; the factors stay on the device of their
            matrix.
        modules: Names of the target matrices to decompose; None stands for all.
        rank: Number of singular directions to keep per matrix, the strongest first; None keeps all.
        dtype: Dtype of the factors, ``"float32"`` or ``"bfloat16"``; None is bfloat16 for a
            bfloat16 model on a GPU, where it halves memory and time, and float32 otherwise.
        method: Algorithm: ``"exact"``, ``"gram"``, or ``"auto"``, which is gram on a GPU and exact
            on a CPU.
        cache: Directory of the files on disk; None keeps nothing there.
        min_coverage: Share of the model's weights, embeddings and head aside, that the target
            matrices must be.
        progress: Function called with the number of matrices done and of all.

    Raises:
        UsageError: The dtype or the method has another name, the rank is below 1, or a module is no
            target.
        ModelError: The model has no target projection, experts of an unknown form, or too many
            weights that are no targets, or it is divided in a way in which no weight can be had
            whole.
        BadWeights: A matrix is not finite; the message names it.
        StorageError: A file cannot be written.
    """
    targets = chosen_modules(model, modules)
    chosen = factor_dtype(dtype, next(iter(targets.values())).weight)
    check_choice("method", method, _METHODS)
    check_rank(rank)
    check_coverage(model, min_coverage)

    def decompose(name: str, weight: Tensor) -> Factors:
        factors = _load_or_make(
            name, weight, chosen, method, None if cache is None else Path(cache)
        )
        if weight.is_cuda:
            torch.cuda.current_stream(weight.device).synchronize()
        return factors if rank is None else factors.truncated(rank)

    division = division_of(module_of(model))
    decomposed: dict[str, Factors] = {}
    results = (
        _side_by_side(decompose, {name: module.weight for name, module in targets.items()})
        if division is None
        else _one_by_one(decompose, targets, division.own(list(target_modules(model))))
    )
    for index, (name, factors) in enumerate(results):
        if factors is not None:
            decomposed[name] = factors
        if progress:
            progress(index + 1, len(targets))
    return SVDCache(decomposed, rank=rank, dtype=chosen)


def _one_by_one(
    decompose: Callable[[str, Tensor], Factors],
    targets: Mapping[str, nn.Linear],
    own_names: Collection[str],
) -> Iterator[tuple[str, Factors | None]]:
    """Gather each matrix whole, and decompose those of this process."""
    for name, linear in targets.items():
        with loaded(linear):
            weight_OI = gather_whole(linear.weight.detach())
            yield name, decompose(name, weight_OI) if name in own_names else None


def _side_by_side(
    decompose: Callable[[str, Tensor], Factors], weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, Factors | None]]:
    """Decompose several matrices of one device at once, in the order of the matrices."""
    device = next(iter(weights.values())).device
    with ExitStack() as stack:
        if device.type == "cuda":
            # The first call of the library loads it, which must not happen in several threads at
            # once.
            torch.linalg.eigh(torch.eye(2, dtype=torch.float64, device=device))
            torch.cuda.synchronize(device)
            # One stream per thread: torch keeps the memory of what is done for each stream apart.
            pool = ThreadPoolExecutor(_STREAMS, initializer=_with_stream, initargs=(device,))
        else:
            # One matrix per core: threads that share a small matrix mostly wait for each other.
            pool = ThreadPoolExecutor(stack.enter_context(one_thread()))
        stack.callback(pool.shutdown, cancel_futures=True)  # what has not begun is dropped
        waiting = {name: pool.submit(decompose, name, weight) for name, weight in weights.items()}
        for name, factors in waiting.items():
            yield name, factors.result()


def _with_stream(device: torch.device) -> None:
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def factor_dtype(name: str | None, weight: Tensor) -> torch.dtype:
    """Return the named dtype of factors, or the default of :func:`weight_svd` for a weight."""
    if name is None:
        return (
            torch.bfloat16 if weight.is_cuda and weight.dtype == torch.bfloat16 else torch.float32
        )
    check_choice("dtype of factors", name, _DTYPES)
    return torch_dtype(name)


def check_rank(rank: int | None) -> None:
    """Raise UsageError unless ``rank`` is None or at least 1."""
    if rank is not None and rank < 1:
        raise UsageError(
            f"rank={rank}", wanted="at least 1", do="ask for 1 or more, or leave it out for all"
        )


def kept_rank(rank: int | None, svd: SVDCache | None) -> int | None:
    """Return how many directions are left where ``rank`` are wanted of factors; None is all."""
    ranks = [rank, None if svd is None else svd.rank]
    return min((most for most in ranks if most is not None), default=None)


def _load_or_make(
    name: str, weight: Tensor, dtype: torch.dtype, method: str, cache: Path | None
) -> Factors:
    path = None
    if cache is not None:
        key = hashlib.sha256(
            f"{_FORMAT}\n{tensor_digest(weight.float())}\n{dtype}\n{method}".encode()
        ).hexdigest()
        path = cache / "svd" / f"{key}.safetensors"
        if (stored := _read(path, weight, dtype)) is not None:
            return stored
    try:
        factors = factorise(weight, dtype=dtype, method=method)
    except BadWeights as error:
        raise BadWeights(f"{name}: {error.seen}", wanted=error.wanted, do=error.do) from error
    if path is not None:
        _write(path, factors)
    return factors


def _read(path: Path, weight: Tensor, dtype: torch.dtype) -> Factors | None:
    """Return the factors in a file, or None where it is missing, damaged or of another shape."""
    try:
        check_tensors(path)
        with safe_open(path, framework="pt") as reader:
            metadata = reader.metadata() or {}
            left, values, right = tensors = [
                reader.get_tensor(name).to(weight.device) for name in ("left", "values", "right")
            ]
            residual, orthogonality = (
                float(metadata[name]) for name in ("residual", "orthogonality")
            )
    except (OSError, SafetensorError, KeyError, ValueError, DataError):
        return None
    rank = min(weight.shape)
    shapes = [(weight.shape[0], rank), (rank,), (rank, weight.shape[1])]
    is_usable = (
        [tensor.shape for tensor in tensors] == shapes
        and all(bool(tensor.isfinite().all()) for tensor in tensors)
        and left.dtype == right.dtype == dtype
    )
    return Factors(left, values, right, residual, orthogonality) if is_usable else None


def _write(path: Path, factors: Factors) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(path.parent, error) from error
    tensors = {name: getattr(factors, name).cpu() for name in ("left", "values", "right")}
    metadata = {name: repr(getattr(factors, name)) for name in ("residual", "orthogonality")}
    write_atomic(path, save(tensors, metadata=metadata | {"format": _FORMAT}))
