"""Noise sizes between machines, and the size predicted for an unmeasured machine.

The size of the noise between two machines i and j of one build is s_ij, the median of their
residuals. All pairs share one shape, which is fitted to all of them together. The size predicted
for a new machine and a validator's machine j is

    usual_j = median over kinds k of median over machines i of kind k of s_ij.

Machines of one kind may agree far more closely than others, so the validator's own kind is left out
where another kind was measured. If machines of the new machine's kind were measured and are noisier
than usual_j, their size is taken instead; quieter ones promise nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from assay.poc.verdict.laws import FloatArray

Pair = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the noise between machines."""

    # Median residual by pair (i, j) with i < j; pairs with median 0 are left out.
    pairs: Mapping[Pair, float]
    kinds: tuple[str, ...] = ()  # of every machine, such as its GPU; empty where it is unknown

    @property
    def typical(self) -> float:
        """Median size over all pairs."""
        return float(np.median(list(self.pairs.values())))

    def predict(self, kind: str, validator: int | None = None) -> float:
        """Return the expected size of a new machine against a validator's machine, or any."""
        directed = {
            (i, j): size for pair, size in self.pairs.items() for i, j in (pair, pair[::-1])
        }
        against = {
            (i, j): size for (i, j), size in sorted(directed.items()) if validator in (None, j)
        }
        # The validator's machine was measured with none of these.
        if not against:
            return self.typical
        foreign = {
            pair: size
            for pair, size in against.items()
            if len({self.kinds[i] or i for i in pair}) == 2
        }
        usual = float(np.median(list(self._by_kind(foreign or against).values())))
        alike = self._by_kind(against).get(kind) if kind else None
        return usual if alike is None else max(usual, alike)

    def _by_kind(self, sizes: Mapping[Pair, float]) -> dict[str | int, float]:
        """Return the median size by kind of the first machine; a machine of unknown kind is a kind
        of its own.
        """
        sizes_of_kind: dict[str | int, list[float]] = {}
        for (i, _), size in sizes.items():
            sizes_of_kind.setdefault(self.kinds[i] or i, []).append(size)
        return {kind: float(np.median(values)) for kind, values in sizes_of_kind.items()}

    def deviations(self) -> FloatArray:
        """Return ln(size / predicted) of every machine as if it were new, against every other
        machine.
        """
        found = []
        for i, kind in enumerate(self.kinds):
            others = replace(
                self, pairs={pair: size for pair, size in self.pairs.items() if i not in pair}
            )
            measured = {
                sum(pair) - i: size
                for pair, size in self.pairs.items()
                if i in pair and others.pairs
            }
            found += [
                math.log(size / others.predict(kind, j)) for j, size in sorted(measured.items())
            ]
        return np.array(found)
