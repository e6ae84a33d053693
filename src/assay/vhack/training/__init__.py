"""Training held back from hack directions: the adapter δS, gates on gradients and on updates, and what they did."""

from assay.vhack.training._arms import ARMS, BASIS_KINDS, Arm, arm_named
from assay.vhack.training._controls import basis_of_kind
from assay.vhack.training._delta import DeltaS
from assay.vhack.training._frames import Frames
from assay.vhack.training._gates import GATES, Box, Gate
from assay.vhack.training._measures import Measures
from assay.vhack.training._optimizer import LEVELS, ProjectedOptimizer
from assay.vhack.training._rollouts import Rollouts, gate_rollouts

__all__ = [
    "ARMS",
    "BASIS_KINDS",
    "GATES",
    "LEVELS",
    "Arm",
    "Box",
    "DeltaS",
    "Frames",
    "Gate",
    "Measures",
    "ProjectedOptimizer",
    "Rollouts",
    "arm_named",
    "basis_of_kind",
    "gate_rollouts",
]
