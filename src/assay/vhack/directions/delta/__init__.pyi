from .arms import ARMS as ARMS
from .arms import Arm as Arm
from .arms import arm_named as arm_named
from .delta import DeltaS as DeltaS
from .optimizer import ProjectedOptimizer as ProjectedOptimizer
