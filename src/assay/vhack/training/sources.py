"""How far the gradient of each source of rollouts lies along the axes.

Shapes: G sources, K kinds of rollouts, M modules, N rollouts or kinds, R coordinates of δS.
"""

import torch
from torch import Tensor

from assay.vhack.directions.delta.rollout_gradients import Rollouts
from assay.vhack.directions.delta.stacked_axes import StackedAxes
from assay.vhack.directions.delta.step_measures import measure_shares
from assay.vhack.training.outcomes import SOURCES, Outcomes
from assay.vhack.training.processes import ALONE, Processes


def measure_sources(
    rollouts: Rollouts, frames: StackedAxes, processes: Processes = ALONE
) -> dict[str, Tensor]:
    """Return ``cin``, ``cin_two_sided`` and ``length`` of the summed gradient of each source.

    Each is [G], in the order of ``SOURCES``, on the device; `split_by_source` reads them. Gradients
    are by the kinds of :meth:`Outcomes.kinds`, and are summed over the processes.
    """
    kinds = [kind.partition(",")[0] for kind in Outcomes.empty().kinds()]
    members = [[float(kind in source) for kind in kinds] for source in SOURCES.values()]
    members_GK = torch.tensor(members)
    sums = []
    for rows_MNR in rollouts.rows:
        # Each backward pass has left one row per kind.
        kinds_MKR = rows_MNR.view(len(rows_MNR), -1, len(kinds), rows_MNR.shape[2]).sum(dim=1)
        sums.append(torch.einsum("gk,mkr->gmr", members_GK.to(rows_MNR.device), kinds_MKR))
    processes.sum_over(sums)
    shares = measure_shares("cin", zip(sums, frames.axes, frames.has_axes, strict=True), 1)
    squares_G = [sum_GMR.double().square().sum(dim=(1, 2)) for sum_GMR in sums]
    return {**shares, "length": torch.stack(squares_G).sum(dim=0).sqrt()}


def split_by_source(measures: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return the numbers of each source; all are read from the device at once."""
    if not measures:
        return {}
    numbers = torch.stack(list(measures.values()), dim=1).tolist()
    return {
        source: dict(zip(measures, row, strict=True))
        for source, row in zip(SOURCES, numbers, strict=True)
    }
