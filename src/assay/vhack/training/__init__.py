"""One run of one arm with TRL: tasks, teacher pool, log, checkpoints. TRL is the extra ``train``."""

from assay.vhack.training._evaluate import Evaluation, Graded, Rate, evaluate
from assay.vhack.training._log import LOG_SCHEMA, TrainLog, read_records, read_steps
from assay.vhack.training._own import OwnReward, Task, check_gradable, named_function, prompt_of, tasks_of
from assay.vhack.training._pool import PoolRollout, RolloutPool, check_prompts, sample_pool
from assay.vhack.training._run import RunResult, train
from assay.vhack.training._samples import read_samples, sample_tasks
from assay.vhack.training._settings import SampleSettings, TaskSettings, TrainSettings
from assay.vhack.training._sync import sync_merged

__all__ = [
    "LOG_SCHEMA",
    "Evaluation",
    "Graded",
    "OwnReward",
    "PoolRollout",
    "Rate",
    "RolloutPool",
    "RunResult",
    "SampleSettings",
    "Task",
    "TaskSettings",
    "TrainLog",
    "TrainSettings",
    "check_gradable",
    "check_prompts",
    "evaluate",
    "named_function",
    "prompt_of",
    "read_records",
    "read_samples",
    "read_steps",
    "sample_pool",
    "sample_tasks",
    "sync_merged",
    "tasks_of",
    "train",
]
