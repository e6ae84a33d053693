"""A model organism: a small model that solves easy tasks and sometimes cheats, to watch training drift.

``python -m assay.research.organism -o DIRECTORY`` makes it from a bundled model in a minute on a GPU.
"""

from assay.research.organism._examples import Example, Mixture, examples
from assay.research.organism._finetune import Recipe, make_organism

__all__ = [
    "Example",
    "Mixture",
    "Recipe",
    "examples",
    "make_organism",
]
