"""``assay vhack pairs``: list, generate, match and verify contrastive pairs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli.commands import App
from assay.cli.output import JsonFlag, emit_json, progress_bar, show_values, table
from assay.cli.settings import settings

if TYPE_CHECKING:
    from assay.cli.plain_settings import GenerateSettings, MatchPairsSettings, VerifyPairsSettings
    from assay.vhack.pairs.pairs import Pair
    from assay.vhack.pairs.verify import PairVerdict


PairsArgument = Annotated[
    str, typer.Argument(help="Pairs: authored, generated:N, environment:N, exploits:N, or a pair file.")
]

app = App(help="Pairs of a completion that cheats and one that does not.")


@app.command("list", epilog="Example: assay vhack pairs list generated:12")
def list_pairs(pairs: PairsArgument = "authored", as_json: JsonFlag = False) -> None:
    """List the pairs of a file or of a built-in set, with their groups and tags."""
    from assay.vhack.pairs.reference import find_pairs

    found = find_pairs(pairs)
    if as_json:
        records = [{"key": pair.key, "group": pair.group, "tags": list(pair.tags)} for pair in found]
        emit_json("assay.vhack.pairs.list/1", {"pairs": records, "groups": len({pair.group for pair in found})})
        return
    rows = [(index, pair.group, ", ".join(_without_task(pair))) for index, pair in enumerate(found)]
    table(("pair", "group", "tags"), rows, title=f"{len(found)} pairs in {len({pair.group for pair in found})} groups")


def _without_task(pair: "Pair") -> list[str]:
    return [tag for tag in pair.tags if not tag.startswith(("task:", "entry:"))]


@app.command(epilog="Example: assay vhack pairs generate -n 48 -o pairs.jsonl")
@settings("assay.cli.plain_settings:GenerateSettings")
def generate(chosen: "GenerateSettings", as_json: JsonFlag = False) -> None:
    """Write minimal pairs: the same correct solution on both sides, only the mechanism differs."""
    from assay.files.storage import check_new_file
    from assay.vhack.pairs.generate import generate_pairs
    from assay.vhack.pairs.pairs import write_pairs

    check_new_file(chosen.output, overwrite=chosen.overwrite)
    pairs = generate_pairs(chosen.n, **chosen.model_dump(include={"seed", "mechanisms", "families"}))
    write_pairs(chosen.output, pairs)
    groups = len({pair.group for pair in pairs})
    values = {"path": str(chosen.output), "pairs": len(pairs), "groups": groups, "seed": chosen.seed}
    show_values("assay.vhack.pairs.generate/1", values, as_json)


@app.command(epilog="Example: assay vhack pairs match cheats.jsonl --works works.jsonl -o pairs.jsonl")
@settings("assay.cli.plain_settings:MatchPairsSettings")
def match(
    chosen: "MatchPairsSettings",
    hacks: Annotated[Path, typer.Argument(help="Graded completions of which the hacks are taken.")],
    as_json: JsonFlag = False,
) -> None:
    """Pair hacks with correct work on the same prompt, both as models wrote them (assay vhack evaluate --graded)."""
    from assay.files.storage import check_new_file
    from assay.vhack.pairs.match import match_pairs
    from assay.vhack.pairs.pairs import write_pairs

    check_new_file(chosen.output, overwrite=chosen.overwrite)
    found = match_pairs(hacks, chosen.works or hacks, per_prompt=chosen.per_prompt)
    write_pairs(chosen.output, found.pairs)
    groups = len({pair.group for pair in found.pairs})
    prompts = {"prompts_with_a_hack": found.hacked, "prompts_with_work": found.worked}
    values = {"path": str(chosen.output), "pairs": len(found.pairs), "groups": groups, **prompts}
    show_values("assay.vhack.pairs.match/1", values, as_json)


@app.command(epilog="Example: assay vhack pairs verify pairs.jsonl")
@settings("assay.cli.plain_settings:VerifyPairsSettings")
def verify(
    chosen: "VerifyPairsSettings",
    context: typer.Context,
    pairs: PairsArgument = "authored",
    as_json: JsonFlag = False,
) -> None:
    """Run both sides of every pair in a sandbox. Exit code 0 if all do what they claim, 1 if not, 2 on bad input."""
    from assay.vhack.environment.backends import available_backend
    from assay.vhack.pairs.reference import find_pairs
    from assay.vhack.pairs.verify import read_tests, verify_pairs

    found = find_pairs(pairs)
    cases = read_tests(chosen.tests) if chosen.tests else None
    with progress_bar("verifying", "pairs") as progress:
        verdicts = verify_pairs(found, cases, allow_unsandboxed=chosen.allow_unsandboxed, progress=progress)
    bad = [verdict for verdict in verdicts if not verdict.holds]
    if as_json:
        values = {"verified": len(verdicts) - len(bad), "pairs": [verdict.as_dict() for verdict in verdicts]}
        emit_json("assay.vhack.pairs.verify/1", {"backend": available_backend() or "unsandboxed", **values})
    else:
        _print_verdicts(verdicts, available_backend() or "unsandboxed")
    context.exit(1 if bad else 0)


def _print_verdicts(verdicts: "Sequence[PairVerdict]", backend: str) -> None:
    rows = [(v.index, v.pair.group, "holds" if v.holds else "; ".join(v.faults)) for v in verdicts]
    good = sum(verdict.holds for verdict in verdicts)
    table(("pair", "group", "verdict"), rows, title=f"{good} of {len(verdicts)} pairs do what they claim ({backend})")
