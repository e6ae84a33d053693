"""The adapter δS, the arms that hold its training back, and what they measure."""

from assay.vhack.delta._advantage import Shortcut, modified
from assay.vhack.delta._arms import (
    ARMS,
    BASIS_KINDS,
    DEFAULT_ARM,
    GATES,
    Arm,
    Box,
    Gate,
    apply_arm,
    arm_named,
    displaced,
    gated_gradient,
)
from assay.vhack.delta._controls import basis_of_kind
from assay.vhack.delta._delta import DeltaS, check_attachable
from assay.vhack.delta._export import LoRA
from assay.vhack.delta._file import delta_lengths
from assay.vhack.delta._frames import Frames, Measures, displacement, share, spread
from assay.vhack.delta._groups import Group, grouped
from assay.vhack.delta._optimizer import ProjectedOptimizer
from assay.vhack.delta._product import Kinds
from assay.vhack.delta._rollouts import Rollouts

__all__ = [
    "ARMS",
    "BASIS_KINDS",
    "DEFAULT_ARM",
    "GATES",
    "Arm",
    "Box",
    "DeltaS",
    "Frames",
    "Gate",
    "Group",
    "Kinds",
    "LoRA",
    "Measures",
    "ProjectedOptimizer",
    "Rollouts",
    "Shortcut",
    "apply_arm",
    "arm_named",
    "basis_of_kind",
    "check_attachable",
    "delta_lengths",
    "displaced",
    "displacement",
    "gated_gradient",
    "grouped",
    "modified",
    "share",
    "spread",
]
