"""One run of one arm with TRL: tasks, teacher pool, log, checkpoints. TRL is the extra ``train``."""

from assay.vhack.training._log import LOG_SCHEMA, TrainLog, read_records, read_steps
from assay.vhack.training._own import OwnReward
from assay.vhack.training._pool import PoolRollout, RolloutPool, sample_pool
from assay.vhack.training._run import RunResult, train
from assay.vhack.training._settings import TrainSettings
from assay.vhack.training._sync import sync_merged

__all__ = [
    "LOG_SCHEMA",
    "OwnReward",
    "PoolRollout",
    "RolloutPool",
    "RunResult",
    "TrainLog",
    "TrainSettings",
    "read_records",
    "read_steps",
    "sample_pool",
    "sync_merged",
    "train",
]
