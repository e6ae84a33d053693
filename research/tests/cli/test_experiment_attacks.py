"""The two commands of the attack experiments; their measurements are tested with the package."""

import json
from pathlib import Path

FEW = ("--nodes", "200", "--rounds", "3", "--validators", "8", "--checkers", "3", "--checked", "4")


def test_a_simulation_prints_what_it_wrote(assay, tmp_path: Path, monkeypatch):
    from assay_research import simulation as _network

    for name, value in {"HONEST_TRIALS": 1000, "TRIALS": 100}.items():
        monkeypatch.setattr(_network, name, value)
    arguments = ("poc", "experiment", "simulate", "--presets", "hardened", *FEW, "-o", tmp_path)
    result = assay(*arguments, "--json")
    assert result.code == 0, result.err
    written = json.loads(result.out)
    assert written["schema"] == "assay.poc.experiment.simulate/1"
    assert Path(written["report"]).is_file()
    again = assay(*arguments)
    assert again.code == 0
    assert "lifetime" in again.out
