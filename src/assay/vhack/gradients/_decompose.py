"""The factors of a model whose weights are divided over processes: each matrix has an owner that decomposes it.

Matrices go in rounds of one per process, those of one size together, so that all processes work at once. A whole weight
exists for a moment in every process of its round, its decomposition in float64 only in that of its owner. Afterwards
each process keeps its rows of U and its columns of Vh, as DTensors.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from assay.vhack.gradients._division import Division
from assay.vhack.gradients._factors import Factors
from assay.vhack.gradients._progress import Progress
from assay.vhack.gradients._sharding import whole


def decompose(
    modules: Mapping[str, nn.Linear],
    division: Division,
    one: Callable[[str, Tensor], Factors],
    dtype: torch.dtype,
    progress: Progress | None,
) -> dict[str, Factors]:
    """Return divided factors of divided weights; every process must call it with the same arguments.

    Args:
        modules: Target matrices by name.
        division: How their model is divided; it has a mesh.
        one: Function that decomposes one whole weight, given its name.
        dtype: Dtype of the factors.
        progress: Function called with the number of matrices done and of all.

    Raises:
        Exception: What decomposing a matrix raised in its owner; every process raises it.
    """
    found: dict[str, Factors] = {}
    ordered = sorted(modules, key=lambda name: sorted(modules[name].weight.shape), reverse=True)
    for start in range(0, len(ordered), division.processes):
        names = ordered[start : start + division.processes]
        found |= _round({name: modules[name].weight for name in names}, division, one, dtype)
        if progress:
            progress(len(found), len(modules))
    return {name: found[name] for name in modules}


def _round(
    weights: Mapping[str, Tensor], division: Division, one: Callable[[str, Tensor], Factors], dtype: torch.dtype
) -> dict[str, Factors]:
    mine: Factors | None = None
    error: Exception | None = None
    for owner, (name, weight) in enumerate(weights.items()):
        gathered = whole(weight.detach())
        if owner == division.rank:
            try:
                mine = one(name, gathered)
            except Exception as raised:  # the other processes would wait for this one
                error = raised
        del gathered
    facts = None if mine is None else (mine.values.cpu(), mine.residual, mine.orthogonality)
    told = division.gathered((facts, error))
    for _, refused in told:
        if refused is not None:
            raise refused
    found = {}
    for owner, (name, weight) in enumerate(weights.items()):
        (values_R, residual, orthogonality), _ = told[owner]
        own_left, own_right = (mine.left, mine.right) if mine and owner == division.rank else (None, None)
        outputs, inputs = weight.shape
        left = _spread(own_left, (outputs, len(values_R)), 0, owner, division, dtype)
        right = _spread(own_right, (len(values_R), inputs), 1, owner, division, dtype)
        found[name] = Factors(left, values_R.to(left.device), right, residual, orthogonality)
    return found


def _spread(
    matrix: Tensor | None, shape: tuple[int, int], dimension: int, owner: int, division: Division, dtype: torch.dtype
) -> Tensor:
    """Return a matrix of the owner, cut along a dimension over all processes."""
    from torch.distributed.tensor import Shard, distribute_tensor

    assert division.mesh is not None
    if matrix is None:
        matrix = torch.empty(shape, dtype=dtype, device=division.mesh.device_type)
    return distribute_tensor(matrix, division.mesh, [Shard(dimension)], src_data_rank=owner)
