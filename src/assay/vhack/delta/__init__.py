"""The adapter δS, the arms that hold its training back, and what they measure."""

from assay.vhack.delta.arms import ARMS, Arm, Gate, apply_arm, arm_named
from assay.vhack.delta.delta import DeltaS
from assay.vhack.delta.file import LoRA
from assay.vhack.delta.optimizer import ProjectedOptimizer

__all__ = ["ARMS", "Arm", "DeltaS", "Gate", "LoRA", "ProjectedOptimizer", "apply_arm", "arm_named"]
