from .adapter import DeltaS as DeltaS
from .arms import ARMS as ARMS
from .arms import Arm as Arm
from .arms import arm_named as arm_named
from .optimizer import ProjectedOptimizer as ProjectedOptimizer
