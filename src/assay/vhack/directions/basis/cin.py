"""The share of a gradient that lies along hack directions.

Shapes: N samples, R coordinates of δS in a module, K axes.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from assay.errors import UsageError

if TYPE_CHECKING:
    pass
from assay.vhack.directions.basis.basis import Basis


def cin(gradients_NR: Tensor, axes_KR: Tensor, two_sided: bool = False) -> Tensor:
    """Return the share of each gradient that lies along the axes of its module, [N], from 0 to 1.

    ``‖relu(V g)‖ / ‖g‖``: only what points hack-ward counts, which is what the one-sided gate
    removes. Two-sided it is ``‖V g‖ / ‖g‖``. A zero gradient has share 0.

    Args:
        gradients_NR: Gradients, one per row.
        axes_KR: Orthonormal rows; zero rows add nothing.
        two_sided: Whether both signs count.
    """
    along_NK: Tensor = gradients_NR @ axes_KR.to(gradients_NR).T
    along_N: Tensor = (along_NK if two_sided else along_NK.relu()).norm(dim=1)
    lengths_N = gradients_NR.norm(dim=1)
    return along_N / torch.where(lengths_N > 0, lengths_N, 1.0)


def cin_over_modules(
    gradients: Mapping[str, Tensor], basis: Basis, *, two_sided: bool = False
) -> Tensor:
    """Return the mean of :func:`cin` over all modules of the basis, one number per sample, [N].

    Args:
        gradients: Gradients, [N, R] per module name; modules that the basis does not have are left
            out.
        basis: Basis with the axes.
        two_sided: Whether both signs count.

    Raises:
        UsageError: A module of the basis has no gradients.
    """
    missing = [name for name in basis.axes if name not in gradients]
    if missing or not basis.axes:
        seen = f"no gradients of {missing[0]}" if missing else "a basis without modules"
        raise UsageError(
            seen,
            wanted="gradients of every module of the basis",
            do="compute the gradients and the basis with the same model",
        )
    shares = [cin(gradients[name], axes_KR, two_sided) for name, axes_KR in basis.axes.items()]
    return torch.stack(shares).mean(dim=0)
