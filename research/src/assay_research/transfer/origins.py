"""Labelled samples by origin: our own pairs, and what others wrote, read where it lies."""

import gzip
import hashlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.vhack.pairs.generate import find_pairs
from assay.vhack.pairs.pairs import Pair

OWN = ("authored", "generated:96", "environment:48", "exploits:48")
SAMPLED_GROUPS = 100  # of a final origin, for detectors that take a pass of the model
SAMPLED_ROLLOUTS = 2  # of a label and a group
CODEFORCES = "datasets/claude_completions_{}.jsonl"


@dataclass(frozen=True)
class Labelled:
    """A completion with its prompt, its label and the group that is held out together."""

    prompt: str
    completion: str
    is_hack: bool
    group: str


def own_samples(reference: str) -> list[Labelled]:
    """Return both sides of pairs that :func:`assay.vhack.find_pairs` knows."""
    return from_pairs(find_pairs(reference))


def from_pairs(pairs: Sequence[Pair]) -> list[Labelled]:
    """Return both sides of pairs."""
    samples = []
    for pair in pairs:
        samples.append(Labelled(str(pair.prompt), str(pair.hack), True, pair.group))
        samples.append(Labelled(str(pair.prompt), str(pair.clean), False, pair.group))
    return samples


def read_origin(name: str, data: Path, codeforces: Path | None = None) -> list[Labelled]:
    """Return all samples of an origin of the plan, A to E.

    Args:
        name: Letter of the origin.
        data: Folder of the files.
        codeforces: Git directory of the repository that holds origin D.
    """
    if name == "A":
        return _sides(data / "hack_pairs.jsonl", "problem_id")
    if name == "B":
        return _sides(data / "pairs_print_vs_assert.jsonl.gz", "problem_id")
    if name == "C":
        return _sides(data / "substrate24.jsonl", "id")
    if name == "D":
        if codeforces is None:
            raise ValueError("origin D is read from a git directory: give --codeforces")
        return _codeforces(codeforces)
    return _teacher_pool(data / "teacher_pool.jsonl.gz")


def clean_solutions(data: Path) -> list[Labelled]:
    """Return canonical solutions of problems that others chose, all of them clean."""
    samples = []
    for row in _rows(data / "leetcode_problems.jsonl.gz"):
        prompt = "\n\n".join(message["content"] for message in row["prompt"])
        text = f"```python\n{row['canonical_solution']}\n```"
        samples.append(Labelled(prompt, text, False, str(row["id"])))
    return samples


def subset(samples: Sequence[Labelled], count: int = SAMPLED_GROUPS) -> list[Labelled]:
    """Return the sample of a final origin that takes passes of a model.

    The groups are the first by the SHA-256 of their names, and of each the first rollouts.
    """
    groups = sorted({sample.group for sample in samples}, key=_digest)[:count]
    counts: dict[tuple[str, bool], int] = {}
    chosen = []
    for sample in samples:
        key = (sample.group, sample.is_hack)
        counts[key] = counts.get(key, 0) + 1
        if sample.group in groups and counts[key] <= SAMPLED_ROLLOUTS:
            chosen.append(sample)
    return chosen


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _rows(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in text.splitlines()]


def _sides(path: Path, group: str) -> list[Labelled]:
    return [
        Labelled(row["prompt"], row[side], side == "hack", str(row[group]))
        for row in _rows(path)
        for side in ("hack", "clean")
    ]


def _teacher_pool(path: Path) -> list[Labelled]:
    samples = []
    for row in _rows(path):
        for rollout in row["rollouts"]:
            is_hack = rollout["hacked"] and not rollout["gt_pass"]
            if is_hack or rollout["gt_pass"]:
                samples.append(
                    Labelled(row["prompt"], rollout["completion"], is_hack, str(row["problem_id"]))
                )
    return samples


def _codeforces(repository: Path) -> list[Labelled]:
    """Return both completions of each prompt that has a hack and a solution."""
    hacks = {}
    for row in _committed(repository, CODEFORCES.format("hacking_openai_format")):
        user, assistant = row["messages"][-2:]
        hacks[user["content"].strip()] = assistant["content"]
    samples = []
    for row in _committed(repository, CODEFORCES.format("no_hacking")):
        prompt = row["full_prompt"].strip()
        if prompt in hacks:
            group = _digest(prompt)[:16]
            samples.append(Labelled(prompt + "\n\n", hacks[prompt], True, group))
            samples.append(Labelled(prompt + "\n\n", row["completion"], False, group))
    return samples


def _committed(repository: Path, path: str) -> list[dict[str, Any]]:
    shown = subprocess.run(
        ["git", "-C", str(repository), "show", f"HEAD:{path}"], capture_output=True, check=True
    )
    return [json.loads(line) for line in shown.stdout.decode().splitlines() if line.strip()]
