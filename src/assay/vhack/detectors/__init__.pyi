from .detector import Detector as Detector
from .evidence import Needs as Needs
from .rollout_judge import fit_judge as fit_judge
