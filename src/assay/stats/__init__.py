"""Honest statistics: the chord law, count and sequential tests, AUROC, resampling.

The formulas and what they assume are derived in docs/statistics.md.
"""

from assay.stats.block_law import BlockLaw
from assay.stats.bootstrap import group_bootstrap
from assay.stats.chord import chord_cdf, r_target_for, valid_rate
from assay.stats.cluster_test import ClusterTest
from assay.stats.noise_laws import LogNoise, NoiseLaw, ScaleNoise
from assay.stats.places import PlaceTest, place_test
from assay.stats.ranks import auroc
from assay.stats.rates import CountTest, count_test, grouped_share_interval, proportion_interval
from assay.stats.sequential import SequentialResult, SequentialTest
from assay.stats.token_law import TokenNoise

__all__ = [
    "BlockLaw",
    "ClusterTest",
    "CountTest",
    "LogNoise",
    "NoiseLaw",
    "PlaceTest",
    "ScaleNoise",
    "SequentialResult",
    "SequentialTest",
    "TokenNoise",
    "auroc",
    "chord_cdf",
    "count_test",
    "group_bootstrap",
    "grouped_share_interval",
    "place_test",
    "proportion_interval",
    "r_target_for",
    "valid_rate",
]
