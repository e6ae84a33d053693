"""A whole run on the small checkpoint."""

from pathlib import Path

import pytest
from assay_research.responses import field as field_module
from assay_research.responses import run as run_module
from assay_research.responses.cheats import CHEATS, GREEDY
from assay_research.responses.run import ResponsesPlan, places
from assay_research.runs.report import build_report
from assay_research.runs.runs import read_run

SOME = ("int4 weights", "fine-tuned, 20 steps", "noise of its own", "stops early")


@pytest.fixture(scope="module")
def finished(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("responses")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(field_module, "HONEST_AUDITS", 200)
        for module in (field_module, run_module):
            patch.setattr(module, "CHEAT_AUDITS", 50)
        patch.setattr(run_module, "AUDITS", 50)
        patch.setattr(run_module, "CHEATS", tuple(cheat for cheat in CHEATS if cheat.name in SOME))
        patch.setattr(run_module, "GREEDY", GREEDY[:1])
        patch.setattr(run_module, "PAIRS", (("bfloat16", "float32"),))
        plan = ResponsesPlan(
            models=(str(small_checkpoint),), honest=16, responses=3, prompt_tokens=16, seq_len=112, batch_size=12,
            temperature=0.1, device="cpu",
        )  # fmt: skip
        plan.measure(folder)
    assert "Red team: served responses" in build_report(folder).read_text()
    return folder, read_run(folder, "responses").cells


def test_every_cell_is_there_once(finished, small_checkpoint):
    cells = finished[1]
    kinds = [cell["kind"] for cell in cells]
    assert sorted(set(kinds)) == ["cheat", "honest", "others", "pair"]
    named = [
        cell["name"] for cell in cells if cell["kind"] == "cheat" and cell["mode"] == "sampled"
    ]
    assert named == [name for name in SOME if "fine-tuned" not in name], "this model reads no text"
    assert places(cells) == [
        (str(small_checkpoint), "bfloat16", mode) for mode in ("sampled", "greedy")
    ]


def test_noise_of_its_own_is_seen_in_margins_alone(finished):
    cell = next(cell for cell in finished[1] if cell.get("name") == "noise of its own")
    methods = cell["methods"]
    assert cell["matches"] < 0.97
    assert methods["margins"]["sequential"][-1] > 0.5
    for sees in ("margins", "Token-DiFR", "GLS"):
        assert methods[sees]["threshold_99"] <= 256, sees
    for blind in ("TOPLOC, top 128", "log-probabilities, each"):
        assert methods[blind]["threshold_99"] is None, blind
    assert methods["sketches"]["sequential"][-1] == 0


def test_int4_weights_are_seen_in_the_states(finished):
    cell = next(
        cell
        for cell in finished[1]
        if cell.get("name") == "int4 weights" and cell["mode"] == "sampled"
    )
    for method in ("sketches", "Activation-DiFR, each", "TOPLOC, top 128"):
        assert cell["methods"][method]["threshold_99"] <= 256, method
