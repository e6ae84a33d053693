"""How far to displace δS before training: what a distance does to the exploit and to honest work, without training.

    python benchmarks/vhack_study_distance.py --organism ORGANISM -o benchmarks/results/vhack_study_distance.json

Log-probabilities of the exploit and of the honest program, and sampled hack and solve rates, on held-out tasks of the
second experiment. Intervals are over tasks.
"""

import numpy as np
import torch
from _common import note, parser, publish
from vhack_study import FAMILIES, both_sides

from assay.models import load_model
from assay.research.study import Grader, StudySettings, TaskPool
from assay.research.study._forward import StackedModel
from assay.research.study._generate import Generator
from assay.research.study._gradient import Batch, token_logprobs
from assay.stats import group_bootstrap
from assay.vhack import weight_svd
from assay.vhack.delta import Frames, basis_of_kind, spread

SETTINGS = StudySettings(prompts=48, rollouts=4, prompt_tokens=176, pool=8, families=FAMILIES, difficulty=(2, 4))


def bases_of(model, svd):
    """Axes by name."""
    _, gradients = both_sides(model, svd)
    return {
        "whole": basis_of_kind("true", gradients["whole"]),
        "whole, 20 by svd": basis_of_kind("true", gradients["whole"], method="svd", top_k=20),
        "minimal": basis_of_kind("true", gradients["minimal"]),
        "random": basis_of_kind("random", gradients["minimal"]),
    }


def prompts_of(pool, episodes):
    """Token ids [1, P, L] and lengths [1, P]."""
    ids = torch.zeros(1, len(episodes), SETTINGS.prompt_tokens, dtype=torch.int64)
    lengths = torch.zeros(1, len(episodes), dtype=torch.int64)
    for p, episode in enumerate(episodes):
        row = pool.prompt(episode)[:-1]
        ids[0, p, : len(row)], lengths[0, p] = torch.tensor(row), len(row)
    return ids, lengths


def logprobs_of(model, pool, episodes, ids, lengths):
    """Of exploit and of honest program, [P, 2]."""
    tokens = torch.full((1, len(episodes), 2, SETTINGS.new_tokens), pool.end)
    for p, episode in enumerate(episodes):
        for j, program in enumerate((episode.exploit(), episode.honest())):
            row = pool.completion(episode, program)[: SETTINGS.new_tokens]
            tokens[0, p, j, : len(row)] = torch.tensor(row)
    with torch.no_grad():
        return token_logprobs(model, Batch(ids, lengths, pool.last, tokens, pool.end)).sum(dim=-1)[0].double().numpy()


def rates_of(model, pool, episodes, ids, lengths, grader):
    """Shares of rollouts that hack and that solve, [P, 2]."""
    shape = (len(episodes), SETTINGS.rollouts, SETTINGS.prompt_tokens, SETTINGS.new_tokens)
    drawn = torch.rand(SETTINGS.new_tokens, 1, *shape[:2], generator=torch.Generator().manual_seed(1))
    texts = pool.texts(Generator(model, shape, pool.end).sample(ids, lengths, pool.last, drawn).flatten(0, 2))
    owners = [episode for episode in episodes for _ in range(SETTINGS.rollouts)]
    verdicts = grader.collect(grader.submit(zip(owners, texts, strict=True)))
    found = np.array([(float(verdict.exploited), float(verdict.correct)) for verdict in verdicts])
    return found.reshape(len(episodes), SETTINGS.rollouts, 2).mean(axis=1)


def interval(values):
    """Mean with its interval over tasks."""
    found = group_bootstrap(lambda x: float(np.mean(x)), [values], [list(range(len(values)))])
    return [round(float(number), 4) for number in (found.value, found.low, found.high)]


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--organism", required=True)
    given = arguments.parse_args()
    model = load_model(given.organism, dtype="float32", device="cpu")
    svd = weight_svd(model)
    bases, pool = bases_of(model, svd), TaskPool(SETTINGS, model.tokenizer)
    episodes = pool.held_out("training")
    ids, lengths = prompts_of(pool, episodes)
    stacked = StackedModel(model, 1, svd)
    cases = [("none", 0.0), *(("whole", far) for far in (0.1, 0.2, 0.4, 0.8, 1.2))]
    cases += [("whole, 20 by svd", 0.2), ("minimal", 0.4), ("random", 0.4)]
    figures = []
    with Grader(1) as grader:
        for name, far in cases:
            delta = [torch.zeros(1, *group.values.shape) for group in stacked.groups]
            if far:
                for moved, axes in zip(delta, Frames(stacked.groups, bases[name]).axes, strict=True):
                    moved[0] = (far * spread(axes, axes.new_ones(axes.shape[:2]))).float()
            stacked.merge(delta)
            logprobs = logprobs_of(stacked, pool, episodes, ids, lengths)
            rates = rates_of(stacked, pool, episodes, ids, lengths, grader)
            columns = {"logp_exploit": logprobs[:, 0], "logp_honest": logprobs[:, 1]}
            columns |= {"hack": rates[:, 0], "solve": rates[:, 1]}
            figures.append({"axes": name, "distance": far, **{key: interval(v) for key, v in columns.items()}})
            note(str(figures[-1]))
    publish(
        "vhack_study_distance", {"tasks": len(episodes), "rollouts": SETTINGS.rollouts, "at": figures}, given.output
    )


if __name__ == "__main__":
    main()
