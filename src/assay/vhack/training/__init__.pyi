from .evaluation import evaluate as evaluate
from .guard import Guard as Guard
from .labels import Labels as Labels
from .log import TrainLog as TrainLog
from .rewards import OwnReward as OwnReward
from .run import train as train
from .sampling import sample_pool as sample_pool
from .settings import TrainSettings as TrainSettings
