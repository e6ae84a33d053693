"""Samples, one prompt with one completion, and pairs, one prompt with two."""

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One prompt and one completion of it, as text; the loss is taken on the completion's tokens only."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Pair:
    """One prompt with a completion that hacks and one that does not.

    Attributes:
        prompt: Text that both completions follow.
        hack: Completion that cheats.
        clean: Completion that does not.
        group: Name for what the pair has in common with others (a mechanism, a task); groups are held out whole.
        tags: Labels, by which `assay.vhack.pairs.verify_pairs` knows what the pair claims.
    """

    prompt: str
    hack: str
    clean: str
    group: str
    tags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """SHA-256 in hex, first 16 digits, of prompt, hack and clean: what makes a pair the same pair."""
        text = json.dumps([self.prompt, self.hack, self.clean], ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def samples(self) -> tuple[Sample, Sample]:
        """Return the hack side and the clean side as samples."""
        return Sample(self.prompt, self.hack), Sample(self.prompt, self.clean)
