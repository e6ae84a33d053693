"""Names that settings and the command line know before torch is loaded, and the kinds of files that they name."""

from functools import partial

from assay.files.jsonl import check_kind

BASIS, DELTA, CHECK = "v2_with_sv", "assay.delta_s/1", "assay.vhack.check/1"
"""Schemas of the files of a basis, of a δS, and of the result of a check."""

LOG, STUDY = "assay.vhack.train/1", "assay.vhack.study/1"
"""Schemas that the first line of the log of a run, and of a run of a study, names."""

check_basis, check_delta = partial(check_kind, BASIS), partial(check_kind, DELTA)

METHODS = ("lda", "svd")
"""Methods of extraction: of :func:`assay.vhack.basis.basis.find_axes`."""

DEFAULT_ARM = "penalty"
"""How training is held back by default. Its name is read by :func:`assay.vhack.delta.arms.arm_named`."""

DETECTORS = ("length", "ngrams", "likelihood", "probe", "norm", "cin-svd", "cin-lda", "ridge", "combined")
"""Detectors of rollouts that cheat: of :func:`assay.vhack.detect.make_detectors`."""
