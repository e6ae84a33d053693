"""Names of detectors, arms and files, known before torch is imported."""

from collections.abc import Collection
from functools import partial
from importlib.util import find_spec

from assay.errors import UsageError
from assay.files.tensors import check_schema

BASIS = "v2_with_sv"
DELTA = "assay.delta_s/1"
CHECK = "assay.vhack.check/1"
"""Schemas of the files of a basis, of a δS, and of the result of a check."""

LOG = "assay.vhack.train/1"
STUDY = "assay.vhack.study/1"
"""Schemas that the first line of the log of a run, and of a run of a study, names."""

check_basis = partial(check_schema, BASIS)
check_delta = partial(check_schema, DELTA)

LOST = 0.05
"""Share of clean samples that a detector may flag, where nothing else is demanded."""

METHODS = ("lda", "svd")
"""Methods of extraction: of :func:`assay.vhack.directions.basis.axes.find_axes`."""

DEFAULT_ARM = "penalty"
"""How training is held back by default. Its name is read by
:func:`assay.vhack.directions.delta.arms.arm_named`.
"""

DETECTORS = {
    "length": "assay.vhack.detectors.sample_numbers:LengthDetector",
    "ngrams": "assay.vhack.detectors.linear:NgramDetector",
    "program": "assay.vhack.detectors.program:ProgramDetector",
    "likelihood": "assay.vhack.detectors.sample_numbers:LikelihoodDetector",
    "probe": "assay.vhack.detectors.linear:ProbeDetector",
    "norm": "assay.vhack.detectors.sample_numbers:GradientNormDetector",
    "cin-svd": "assay.vhack.detectors.axes:AxesDetector",
    "cin-lda": "assay.vhack.detectors.axes:AxesDetector",
    "ridge": "assay.vhack.detectors.linear:GradientRidgeDetector",
    "combined": "assay.vhack.detectors.comparison:CombinedDetector",
}
"""Detectors of reward hacking and their classes, from the cheapest to the dearest."""


def check_trackers(names: Collection[str], there: Collection[str] | None = None) -> None:
    """Refuse a tracker that is not among the given or installed ones."""
    # Three trackers of transformers are not named as their packages.
    if there is None:
        there = [
            n
            for n in names
            if n in ("azure_ml", "flyte", "tensorboard") or (n.isidentifier() and find_spec(n))
        ]
    if missing := [name for name in names if name not in there]:
        raise UsageError(
            f"tracker {', '.join(missing)}",
            wanted=f"one that is installed: {', '.join(there) or 'there is none'}",
            do="install it, or leave it out: log.jsonl has everything",
        )
