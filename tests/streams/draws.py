"""Ten thousand random draws from the streams, in groups of one shape and dtype, and the list of their SHA-256.

Every choice comes from the digest of a text, so the draws are the same everywhere and for ever. The committed list is
made by the numpy definition; every other backend, on any machine, is compared with it:

    python -m tests.streams.draws        writes tests/vectors/draws_sha256.json again
"""

import json
from dataclasses import dataclass
from pathlib import Path

from assay.streams import DTYPES, get_backend, seed32, seeds
from assay.streams.backends import digest

PATH = Path(__file__).parents[1] / "vectors" / "draws_sha256.json"
GROUPS, DRAWS_PER_GROUP, MAX_N = 500, 20, 70_000


@dataclass(frozen=True)
class Group:
    """Draws with one length, dtype and strength and different seeds."""

    number: int

    @property
    def n(self):
        """1 to 70 000. The first groups take the smallest lengths; a third of the rest are uniform, others smaller."""
        if self.number < 20:
            return self.number + 1
        if self.number == 20:
            return MAX_N
        return 1 + ((self._choice("n") % MAX_N) >> max(0, self._choice("scale") % 18 - 5))

    @property
    def dtype(self):
        return DTYPES[self._choice("dtype") % 3]

    @property
    def strength(self):
        return (32, 256)[self._choice("strength") % 2]

    @property
    def sha256(self):
        """Of the numpy definition."""
        return self.draw(get_backend("numpy"))

    def draw(self, backend):
        texts = [f"draw_{self.number}_{i}" for i in range(DRAWS_PER_GROUP)]
        return digest(backend.normals(seeds(texts, self.strength), self.n, self.dtype))

    def _choice(self, what):
        return seed32(f"draw_{self.number}_{what}")


def main():
    rows = [[group.n, group.dtype, group.strength, group.sha256] for group in map(Group, range(GROUPS))]
    lines = ",\n".join(json.dumps(row) for row in rows)
    columns = f'"n, dtype, strength, SHA-256 of the normals [{DRAWS_PER_GROUP}, n]"'
    PATH.write_text(f'{{\n"columns": {columns},\n"rows": [\n{lines}\n]\n}}\n')


if __name__ == "__main__":
    main()
