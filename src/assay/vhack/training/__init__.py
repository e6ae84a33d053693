"""One run of one arm with TRL: tasks, teacher pool, log, checkpoints. TRL is the extra ``train``."""

from assay.vhack.training.evaluation import Evaluation, evaluate, sample_tasks
from assay.vhack.training.log import TrainLog
from assay.vhack.training.pool import sample_pool
from assay.vhack.training.rewards import OwnReward
from assay.vhack.training.run import train
from assay.vhack.training.settings import SampleSettings, TaskSettings, TrainSettings

__all__ = [
    "Evaluation",
    "OwnReward",
    "SampleSettings",
    "TaskSettings",
    "TrainLog",
    "TrainSettings",
    "evaluate",
    "sample_pool",
    "sample_tasks",
    "train",
]
