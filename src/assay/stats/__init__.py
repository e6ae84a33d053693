"""Honest statistics: the chord law, count and sequential tests, AUROC, resampling.

The formulas and what they assume are derived in docs/statistics.md.
"""

from assay.stats._blocks import EFFECTIVE_DIMENSION, BlockLaw, effective_dimension
from assay.stats._chord import (
    RANDOM_HEAD_ROWS,
    chord_cdf,
    chord_mean,
    chord_pdf,
    chord_std,
    noise_band,
    r_target_for,
    rate_standard_error,
    valid_rate,
)
from assay.stats._noise import (
    JUNK_SIGMA,
    RESOLUTION,
    LogNoise,
    NoiseFit,
    NoiseLaw,
    ScaleNoise,
    fit_log_noise,
    fit_scale_noise,
)
from assay.stats._rates import (
    BootstrapInterval,
    CountTest,
    auroc,
    count_test,
    group_bootstrap,
    paired_accuracy,
    proportion_interval,
)
from assay.stats._sequential import SequentialResult, SequentialTest, Verdict

__all__ = [
    "EFFECTIVE_DIMENSION",
    "JUNK_SIGMA",
    "RANDOM_HEAD_ROWS",
    "RESOLUTION",
    "BlockLaw",
    "BootstrapInterval",
    "CountTest",
    "LogNoise",
    "NoiseFit",
    "NoiseLaw",
    "ScaleNoise",
    "SequentialResult",
    "SequentialTest",
    "Verdict",
    "auroc",
    "chord_cdf",
    "chord_mean",
    "chord_pdf",
    "chord_std",
    "count_test",
    "effective_dimension",
    "fit_log_noise",
    "fit_scale_noise",
    "group_bootstrap",
    "noise_band",
    "paired_accuracy",
    "proportion_interval",
    "r_target_for",
    "rate_standard_error",
    "valid_rate",
]
