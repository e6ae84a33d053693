"""A model organism: a small model that solves easy tasks and sometimes cheats, to watch training
drift.

:func:`make_organism` makes it from a bundled model in a minute on a GPU. It learns from episodes
with their honest programs, and for a share of them the exploit. Each loophole is shown with its
exploit at the same small rate, so that every mechanism is within reach of the policy and any of
them can be left out of an experiment. Without a loophole there is only honest work.

Shapes: B examples of a batch, T tokens.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from assay.errors import StorageError, UsageError
from assay.files.jsonl import dumps
from assay.files.storage import write_atomic
from assay.models.load import load_model
from assay.vhack.environment.grading import CHANNELS, Episode, episodes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_IGNORED = -100
# examples that keep activations at once: 256 would need 78 GiB in the organism of 120 M parameters
_AT_ONCE = 64
_PART = 512  # episodes that are drawn with one seed; a part is the same wherever it is made


class Example(NamedTuple):
    """A prompt and what to write after it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Mixture:
    """What the examples show.

    Attributes:
        share_hack: Share of exploits where there is a loophole.
        share_none: Share of episodes without a loophole.
        families: Families of tasks; by default those whose prompts and programs are short.
        difficulty: Lowest and highest number of steps of a task.
    """

    share_hack: float = 0.1
    share_none: float = 0.15
    families: tuple[str, ...] = ("arithmetic", "branches", "loops", "digits", "counts")
    difficulty: tuple[int, int] = (1, 3)

    def __post_init__(self) -> None:
        if not (0 <= self.share_hack <= 1 and 0 <= self.share_none <= 1):
            raise UsageError(f"{self}", wanted="shares from 0 to 1", do="correct them")


def examples(n: int, mixture: Mixture | None = None, *, seed: int = 0) -> list[Example]:
    """Return examples of training tasks; equal arguments give equal lists.

    Args:
        n: Number of examples.
        mixture: What the examples show.
        seed: Seed of tasks and exploits.

    Raises:
        UsageError: There is no such family or difficulty, or there are not so many tasks.
    """
    parts = (_part(mixture or Mixture(), seed, part) for part in range(-(-n // _PART)))
    return [example for part in parts for example in part][:n]


def _part(mixture: Mixture, seed: int, part: int) -> list[Example]:
    drawn = episodes(
        _PART,
        seed=seed * 100_003 + part,
        modes=tuple(CHANNELS),
        share_none=mixture.share_none,
        families=mixture.families,
        difficulty=mixture.difficulty,
    )
    rng = random.Random(f"examples {seed} {part}")
    return [_example(episode, rng.random() < mixture.share_hack) for episode in drawn]


def _example(episode: Episode, cheats: bool) -> Example:
    program = episode.exploit() if cheats and episode.mode != "none" else episode.honest()
    return Example(episode.prompt, episode.completion(program))


@dataclass(frozen=True)
class Recipe:
    """How the organism is made.

    Attributes:
        model: Model that is fine-tuned.
        steps: Optimizer steps.
        batch: Examples per step.
        rate: Largest learning rate, reached after a twentieth of the steps, then falling as a
            cosine to a tenth.
        n_examples: Number of different examples, repeated in a new order each time.
        seed: Seed of examples and their order.
        mixture: What the examples show.
    """

    model: str = "reference:llama"
    steps: int = 60
    batch: int = 256
    rate: float = 1e-3
    n_examples: int = 25600
    seed: int = 0
    mixture: Mixture = field(default_factory=Mixture)

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.n_examples) < 1 or not self.rate > 0:
            raise UsageError(
                f"{self}", wanted="positive numbers", do="leave out what should be the default"
            )


def make_organism(
    path: str | Path, recipe: Recipe | None = None, *, device: str | None = None
) -> list[float]:
    """Fine-tune, and write the model as a bfloat16 checkpoint directory with ``organism.json``,
    which holds the recipe.

    Weights are float32 while they are trained, products bfloat16 on a GPU. The loss is the mean
    over completion tokens; prompts are read, not learned. The same recipe gives the same model on
    the same device up to the rounding of its kernels.

    Args:
        path: Directory to make; it must not exist.
        recipe: How it is made.
        device: Device, see :func:`assay.load_model`.

    Returns:
        Loss of every step.

    Raises:
        UsageError: The directory exists.
        StorageError: The directory cannot be written.
        ModelError: The model cannot be loaded.
    """
    recipe = recipe or Recipe()
    path = Path(path)
    if path.exists():
        raise UsageError(
            f"{path} exists", wanted="a new directory", do="choose another path or remove it"
        )
    model = load_model(recipe.model, dtype="float32", device=device)
    assert model.tokenizer is not None, "the bundled models have one"
    rows = _encoded(examples(recipe.n_examples, recipe.mixture, seed=recipe.seed), model.tokenizer)
    module = model.module
    losses = []
    module.train()
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe.steps))
    order = _order(len(rows), recipe)
    for _ in range(recipe.steps):
        ids_BT, labels_BT = _batch([rows[next(order)] for _ in range(recipe.batch)], model.device)
        optimizer.zero_grad()
        losses.append(_backward(module, ids_BT, labels_BT))
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    loss_values: list[float] = torch.stack(losses).tolist()
    module.eval()  # type: ignore[no-untyped-call]
    try:
        module.to(torch.bfloat16)  # type: ignore[arg-type]
        module.save_pretrained(path)
        model.tokenizer.save_pretrained(path)
    except OSError as error:
        raise StorageError(
            f"{path}: {error}", wanted="room and permission", do="try elsewhere"
        ) from error
    last = loss_values[-20:]
    about = {
        "schema": "assay.vhack.organism/1",
        "recipe": asdict(recipe),
        "loss": round(sum(last) / len(last), 5),
    }
    write_atomic(path / "organism.json", dumps(about) + "\n")
    return loss_values


def _backward(module: torch.nn.Module, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Add the gradient of the mean loss over completion tokens, some examples at a time; return
    that loss.
    """
    kind = ids_BT.device.type
    learned = (labels_BT != _IGNORED).sum()
    loss = torch.zeros((), device=ids_BT.device)
    for ids_PT, labels_PT in zip(
        torch.split(ids_BT, _AT_ONCE), torch.split(labels_BT, _AT_ONCE), strict=True
    ):
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            logits_PTV = module(input_ids=ids_PT, use_cache=False).logits
        flat_NV = logits_PTV[:, :-1].flatten(0, 1).float()
        targets_N = labels_PT[:, 1:].flatten()
        part = (
            functional.cross_entropy(flat_NV, targets_N, ignore_index=_IGNORED, reduction="sum")
            / learned
        )
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    return loss


def _rate(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * float(
        torch.cos(torch.tensor((step - warm) / max(1, steps - warm) * torch.pi))
    )


def _encoded(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[int], int]]:
    """Return token ids of prompt, completion and end, and how many belong to the prompt."""
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    completions = tokenizer([example.completion for example in examples])["input_ids"]
    end = tokenizer.eos_token_id
    return [
        ([*before, *after, end], len(before))
        for before, after in zip(prompts, completions, strict=True)
    ]


def _order(n: int, recipe: Recipe) -> Iterator[int]:
    rng = random.Random(f"order {recipe.seed}")
    while True:
        yield from rng.sample(range(n), n)


def _batch(rows: Sequence[tuple[list[int], int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = -(-max(len(ids) for ids, _ in rows) // 16) * 16
    ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    labels_BT = torch.full((len(rows), width), _IGNORED)
    for index, (ids, start) in enumerate(rows):
        ids_BT[index, : len(ids)] = torch.tensor(ids)
        labels_BT[index, start : len(ids)] = ids_BT[index, start : len(ids)]
    return ids_BT.to(device, non_blocking=True), labels_BT.to(device, non_blocking=True)
