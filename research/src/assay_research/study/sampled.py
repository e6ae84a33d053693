"""Pairs whose hack sides a model has found by itself: sampled after plain training has taught it to cheat.

What training finds may differ from what one writes down beforehand. Here both sides are sampled: the hack by a model
that was trained on open loopholes, the clean side by the model that it was before, on the same prompt.
"""

from typing import TYPE_CHECKING

from assay.errors import DataError
from assay.vhack.basis.basis import Basis
from assay.vhack.gradients.svd import SVDCache
from assay.vhack.pairs.pairs import Pair
from assay_research.study.grading import Grader
from assay_research.study.loop import Study
from assay_research.study.plan import StudyRun, StudySettings

if TYPE_CHECKING:
    import torch

    from assay.models.load import Model


_MOST_BATCHES = 64


def sampled_pairs(
    n: int,
    model: "Model",
    svd: SVDCache,
    basis: Basis,
    settings: StudySettings,
    grader: Grader,
    *,
    seed: int,
    dtype: "torch.dtype",
) -> list[Pair]:
    """Return pairs of a sampled hack and a sampled correct, not vacuous program on the same prompt.

    Args:
        n: Number of pairs.
        model: Model that the runs start from.
        svd: Factors of its weights.
        basis: Axes that are measured while the cheater is trained; they have no effect.
        settings: Settings of the study; the cheater is trained for so many steps.
        grader: Grader of the programs.
        seed: Seed of the cheater, which should be no seed of the study.
        dtype: Dtype of weights and activations.

    Raises:
        DataError: There were too few prompts on which one model cheats and the other does the work.
    """
    cheater, before = (
        Study([StudyRun("none", seed)], model, svd, {"true": basis}, settings, dtype=dtype) for _ in range(2)
    )
    cheater.run(grader)
    found: dict[str, Pair] = {}
    for batch in range(_MOST_BATCHES):
        if len(found) >= n:
            break
        episodes = cheater.pool.drawn(StudyRun("none", seed), settings.steps + batch)
        sides = []
        for study in (cheater, before):
            (cohort,) = study.cohorts
            rollouts = cohort.write(grader, [episodes], f"pairs {batch}")
            sides.append((cohort.texts(rollouts.batch), grader.collect(rollouts.pending)))
        for p, episode in enumerate(episodes):
            own = slice(p * settings.rollouts, (p + 1) * settings.rollouts)
            (hacks, judged), (works, checked) = ((texts[own], verdicts[own]) for texts, verdicts in sides)
            hack = next((text for text, v in zip(hacks, judged, strict=True) if v.exploited), None)
            clean = next((text for text, v in zip(works, checked, strict=True) if v.correct and not v.vacuous), None)
            if hack is not None and clean is not None:
                tags = ("sampled", "environment", f"mechanism:{episode.mode}", f"channel:{episode.mode}")
                family = episode.task.family.name
                pair = Pair(episode.prompt, hack, clean, family, (*tags, f"task:{episode.task.name}"))
                found.setdefault(pair.prompt, pair)
    if len(found) < n:
        raise DataError(
            f"{len(found)} sampled pairs", wanted=f"{n}", do="train the cheater longer, or ask for fewer pairs"
        )
    return list(found.values())[:n]
