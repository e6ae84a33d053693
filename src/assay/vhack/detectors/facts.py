"""Facts of the programs in completions: of their text, their syntax tree and a sandboxed run.

Shapes: S samples, F facts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from assay.errors import BackendUnavailable, UsageError
from assay.vhack.detectors.program_facts import TEXT_FACTS, TREE_FACTS, text_facts, tree_facts
from assay.vhack.detectors.program_runs import RUN_FACTS, run_facts
from assay.vhack.detectors.program_source import MOST_CHARACTERS, read_examples, read_program
from assay.vhack.pairs.pairs import Sample, text_of

FACTS = (*TEXT_FACTS, *TREE_FACTS, *RUN_FACTS)
"""Names of the facts, in the order of the columns."""


def collect_facts(samples: Sequence[Sample]) -> Tensor:
    """Return the facts of each sample, [S, F]; without a sandbox no program is run."""
    facts = (program_facts(text_of(each.prompt), text_of(each.completion)) for each in samples)
    rows = [[fact.get(name, 0.0) for name in FACTS] for fact in facts]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, len(FACTS))


def program_facts(prompt: str, completion: str) -> dict[str, float]:
    """Return the facts of one completion by name; a fact that is missing is 0."""
    code, tree = read_program(prompt, completion)
    if tree is None:
        return text_facts(completion[:MOST_CHARACTERS])
    examples = read_examples(prompt)
    facts = text_facts(code)
    try:
        facts |= tree_facts(tree, examples)
        facts |= run_facts(code, tree, examples, reports=bool(facts["reports"]))
    except (BackendUnavailable, UsageError):
        return facts  # there is no sandbox, or an example is not made of JSON values
    except (RecursionError, ValueError):
        return facts  # a tree too deep to walk, or a number too long to print
    if not (facts["special"] or facts["copied"] or facts["unread"]):
        # An honest search that finds nothing in changed inputs has one answer too.
        facts["constant"] = 0.0
    return facts
