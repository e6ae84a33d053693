"""The model, the detector and the tasks of the run; change these first."""

from assay.vhack.environment import episodes

MODEL = "reference:organism"
DETECTOR = "ngrams"
TASKS = episodes(256, seed=0, modes=["run_tests", "sentinel"], difficulty=(1, 3))
"""Each has a loophole, which the policy takes in about one rollout of ten from the start."""
