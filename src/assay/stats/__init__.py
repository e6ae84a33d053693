"""Honest statistics: the chord law, count and sequential tests, AUROC, resampling.

The formulas and what they assume are derived in docs/statistics.md.
"""

from assay.stats._blocks import EFFECTIVE_DIMENSION, BlockLaw, MeasuredBlockLaw, effective_dimension
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
from assay.stats._clusters import ClusterResult, ClusterTest
from assay.stats._fits import FEWEST_RESIDUALS, NoiseFit, fit_log_noise, fit_scale_noise
from assay.stats._noise import JUNK_SIGMA, RESOLUTION, LogNoise, NoiseLaw, ScaleNoise, Spread
from assay.stats._places import MATERIAL_RATIO, PLACE_ALPHA, SUSPICION, PlaceTest, place_test
from assay.stats._rates import (
    BootstrapInterval,
    CountTest,
    auroc,
    count_test,
    group_bootstrap,
    grouped_proportion_interval,
    grouped_share_interval,
    paired_accuracy,
    proportion_interval,
)
from assay.stats._sequential import Paths, SequentialResult, SequentialTest, Verdict
from assay.stats._tokens import (
    COLUMNS,
    FEWEST_TOKENS,
    LEAST_LOG,
    SCALES,
    UNSEEN,
    TokenFit,
    TokenNoise,
    check_enough_tokens,
    fit_token_noise,
    stored,
    token_profile,
)

__all__ = [
    "COLUMNS",
    "EFFECTIVE_DIMENSION",
    "FEWEST_RESIDUALS",
    "FEWEST_TOKENS",
    "JUNK_SIGMA",
    "LEAST_LOG",
    "MATERIAL_RATIO",
    "PLACE_ALPHA",
    "RANDOM_HEAD_ROWS",
    "RESOLUTION",
    "SCALES",
    "SUSPICION",
    "UNSEEN",
    "BlockLaw",
    "BootstrapInterval",
    "ClusterResult",
    "ClusterTest",
    "CountTest",
    "LogNoise",
    "MeasuredBlockLaw",
    "NoiseFit",
    "NoiseLaw",
    "Paths",
    "PlaceTest",
    "ScaleNoise",
    "SequentialResult",
    "SequentialTest",
    "Spread",
    "TokenFit",
    "TokenNoise",
    "Verdict",
    "auroc",
    "check_enough_tokens",
    "chord_cdf",
    "chord_mean",
    "chord_pdf",
    "chord_std",
    "count_test",
    "effective_dimension",
    "fit_log_noise",
    "fit_scale_noise",
    "fit_token_noise",
    "group_bootstrap",
    "grouped_proportion_interval",
    "grouped_share_interval",
    "noise_band",
    "paired_accuracy",
    "place_test",
    "proportion_interval",
    "r_target_for",
    "rate_standard_error",
    "stored",
    "token_profile",
    "valid_rate",
]
