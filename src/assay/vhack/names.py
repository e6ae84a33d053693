"""Names that settings and the command line know before torch is loaded."""

METHODS = ("lda", "svd")
"""Methods of extraction: of :func:`assay.vhack.basis.basis.find_axes`."""

DEFAULT_ARM = "displaced-0.4+erase-update-two-sided"
"""How training is held back by default. Its name is read by :func:`assay.vhack.delta.arms.arm_named`."""

DETECTORS = ("length", "ngrams", "likelihood", "probe", "norm", "cin-svd", "cin-lda", "ridge", "combined")
"""Detectors of rollouts that cheat: of :func:`assay.vhack.detect.make_detectors`."""
