"""``assay vhack pairs``: list, generate, match and verify pairs of a cheat and honest work."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

import assay.vhack.pairs
from assay.cli.flags import ARGUMENT, FileSettings, Seed, Unsandboxed
from assay.cli.vhack import PAIRS_HELP, pairs
from assay.framework.output import progress_bar, show_tables, show_values
from assay.settings import Flag, Settings

UNSHOWN = ("task:", "entry:")  # beginnings of tags that a table leaves out


class ListSettings(Settings):
    """Settings of ``assay vhack pairs list``."""

    pairs: Annotated[str, ARGUMENT] = Field("authored", description=PAIRS_HELP)


class GenerateSettings(FileSettings):
    """Settings of ``assay vhack pairs generate``."""

    n: Annotated[int, Flag(("-n", "--count"), unit="PAIRS")] = Field(
        96, lt=100_000, description="Number of pairs."
    )
    seed: Seed = 0
    mechanisms: Annotated[tuple[str, ...] | None, Flag(("--mechanism",), unit="NAME")] = Field(
        None, description="Use this mechanism only; may be repeated."
    )
    families: Annotated[tuple[str, ...] | None, Flag(("--family",), unit="NAME")] = Field(
        None, description="Use tasks of this family only; may be repeated."
    )


class MatchSettings(FileSettings):
    """Settings of ``assay vhack pairs match``."""

    hacks: Annotated[Path, ARGUMENT] = Field(
        description="Graded completions of which the hacks are taken."
    )
    works: Path | None = Field(
        None, description="Those of which correct work is taken; by default the same."
    )
    per_prompt: Annotated[int, "PAIRS"] = Field(1, ge=1, description="Most pairs of one prompt.")


class VerifyPairsSettings(ListSettings):
    """Settings of ``assay vhack pairs verify``."""

    tests: Path | None = Field(None, description="JSON Lines with hidden cases of your own tasks.")
    allow_unsandboxed: Unsandboxed = False


@pairs.add("list", ListSettings, example="assay vhack pairs list generated:12")
def list_pairs(chosen: ListSettings, as_json: bool) -> None:
    """List pairs with their groups and tags."""
    all_pairs = assay.vhack.pairs.find_pairs(chosen.pairs)
    groups = len({pair.group for pair in all_pairs})
    records = [
        {"key": pair.key, "group": pair.group, "tags": list(pair.tags)} for pair in all_pairs
    ]
    rows = [
        (index, pair.group, ", ".join(tag for tag in pair.tags if not tag.startswith(UNSHOWN)))
        for index, pair in enumerate(all_pairs)
    ]
    show_tables(
        "assay.vhack.pairs.list/1",
        {"pairs": records, "groups": groups},
        as_json,
        (("pair", "group", "tags"), rows, f"{len(all_pairs)} pairs in {groups} groups"),
    )


@pairs.add("generate", GenerateSettings, example="assay vhack pairs generate -n 48 -o pairs.jsonl")
def generate(chosen: GenerateSettings, as_json: bool) -> None:
    """Write minimal pairs.

    The same correct solution is on both sides, only the mechanism differs.
    """
    pairs = assay.vhack.pairs.generate_pairs(
        chosen.n, **chosen.model_dump(include={"seed", "mechanisms", "families"})
    )
    assay.vhack.pairs.write_pairs(chosen.output, pairs)
    values = {
        "path": str(chosen.output),
        "pairs": len(pairs),
        "groups": len({pair.group for pair in pairs}),
        "seed": chosen.seed,
    }
    show_values("assay.vhack.pairs.generate/1", values, as_json)


@pairs.add(
    "match",
    MatchSettings,
    example="assay vhack pairs match cheats.jsonl --works works.jsonl -o pairs.jsonl",
)
def match(chosen: MatchSettings, as_json: bool) -> None:
    """Pair hacks with correct work on the same prompt.

    Models wrote both: `assay vhack evaluate --graded` writes such files.
    """
    matched = assay.vhack.pairs.match_pairs(
        chosen.hacks, chosen.works or chosen.hacks, per_prompt=chosen.per_prompt
    )
    assay.vhack.pairs.write_pairs(chosen.output, matched.pairs)
    values = {
        "path": str(chosen.output),
        "pairs": len(matched.pairs),
        "groups": len({pair.group for pair in matched.pairs}),
        "prompts_with_a_hack": matched.hacked,
        "prompts_with_work": matched.worked,
    }
    show_values("assay.vhack.pairs.match/1", values, as_json)


@pairs.add("verify", VerifyPairsSettings, example="assay vhack pairs verify pairs.jsonl")
def verify(chosen: VerifyPairsSettings, as_json: bool) -> int:
    """Run both sides of every pair in a sandbox.

    Exit code 0 if all do what they claim, 1 if not, 2 on bad input.
    """
    from assay.vhack.environment.backends import available_backend
    from assay.vhack.pairs.verify import read_tests

    all_pairs = assay.vhack.pairs.find_pairs(chosen.pairs)
    cases = read_tests(chosen.tests) if chosen.tests else None
    with progress_bar("verifying", "pairs") as progress:
        verdicts = assay.vhack.pairs.verify_pairs(
            all_pairs, cases, allow_unsandboxed=chosen.allow_unsandboxed, progress=progress
        )
    backend = available_backend() or "unsandboxed"
    good = sum(verdict.holds for verdict in verdicts)
    values = {
        "backend": backend,
        "verified": good,
        "pairs": [verdict.as_dict() for verdict in verdicts],
    }
    rows = [(v.index, v.pair.group, "holds" if v.holds else "; ".join(v.faults)) for v in verdicts]
    title = f"{good} of {len(verdicts)} pairs do what they claim ({backend})"
    show_tables(
        "assay.vhack.pairs.verify/1",
        values,
        as_json,
        (("pair", "group", "verdict"), rows, title),
    )
    return 0 if good == len(verdicts) else 1
