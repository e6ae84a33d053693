"""Facts of the programs in completions: of their text, their syntax tree and a sandboxed run.

Shapes: S samples, F facts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from assay.errors import BackendUnavailable
from assay.vhack.detectors.program_facts import TEXT_FACTS, TREE_FACTS, text_facts, tree_facts
from assay.vhack.detectors.program_runs import RUN_FACTS, run_facts
from assay.vhack.detectors.program_source import read_examples, read_program
from assay.vhack.pairs.pairs import Sample, text_of

FACTS = (*TEXT_FACTS, *TREE_FACTS, *RUN_FACTS)
"""Names of the facts, in the order of the columns."""


def collect_facts(samples: Sequence[Sample]) -> Tensor:
    """Return the facts of each sample, [S, F]; without a sandbox no program is run."""
    rows = []
    for sample in samples:
        facts = program_facts(text_of(sample.prompt), text_of(sample.completion))
        rows.append([facts.get(name, 0.0) for name in FACTS])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, len(FACTS))


def program_facts(prompt: str, completion: str) -> dict[str, float]:
    """Return the facts of one completion by name; a fact that is missing is 0."""
    code, tree = read_program(prompt, completion)
    if tree is None:
        return text_facts(completion)
    examples = read_examples(prompt)
    facts = text_facts(code) | tree_facts(tree, examples)
    try:
        facts |= run_facts(code, tree, examples, reports=bool(facts["reports"]))
    except BackendUnavailable:
        return facts
    if not (facts["special"] or facts["copied"] or facts["unread"]):
        # An honest search that finds nothing in changed inputs has one answer too.
        facts["constant"] = 0.0
    return facts
