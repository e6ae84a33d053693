"""Published sets by build: who is compared with whom, copies, and faults of the place."""

from pathlib import Path

import pytest
from assay_research.clusters.builds import base_name, builds_of, sound_builds
from assay_research.vector_sets import read_vector_sets

from research.tests import published


def grouped(tmp_path: Path, rows):
    return builds_of(read_vector_sets(published.write(tmp_path / "sets.jsonl", rows)))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("MiniMaxAI/MiniMax-M2.7", "minimax-m2.7"),
        ("/root/models/MiniMax-M2.7/", "minimax-m2.7"),
        ("/root/.cache/huggingface/hub/models--moonshotai--Kimi-K2.6/snapshots/4f7a", "kimi-k2.6"),
        ("Model", "model"),
    ],
)
def test_the_name_of_a_model(model: str, name: str):
    assert base_name(model) == name


def test_sets_are_grouped_by_round_model_and_month(tmp_path: Path):
    rows = [
        published.machine("2026-04__a-1", model="owner/Model-A"),
        published.machine("2026-05__a-2", model="/models/model_a"),
        published.machine("2026-05__model_a_4xh100", config={}),
        published.machine("2026-05__a-int4-1", model="other/Model-A-int4"),
        published.machine("2026-05__model-a-int4-x", config={}),
        published.machine("elsewhere", model="owner/Model-A", block="other"),
        published.machine("unknown-1", config={}),
    ]
    groups = grouped(tmp_path, rows)
    found = {group.name: [one.name for one in group.sets] for group in groups}
    assert found == {
        "model-a (round 1)": ["2026-04__a-1", "2026-05__a-2", "2026-05__model_a_4xh100"],
        "model-a-int4": ["2026-05__a-int4-1", "2026-05__model-a-int4-x"],
        "model-a (round 2)": ["elsewhere"],
        "unknown": ["unknown-1"],
    }
    names = [build.name for build in sound_builds(groups)]
    assert names == [
        "2026-04 model-a",
        "2026-05 model-a",
        "2026-05 model-a-int4",
        "model-a",
        "unknown",
    ]
    assert groups[0].family == "model"


def test_copies_are_dropped(tmp_path: Path):
    rows = published.network(3)
    copy = published.machine("copied", gpu="H200")
    copy["vectors"] = [*rows[1]["vectors"][:250], *copy["vectors"][250:]]
    (group,) = grouped(tmp_path, [*rows, copy])
    assert len(group.sets) == 3
    assert group.copies == (("copied", "2026-05__model-a-1"),)


def test_a_faulty_machine_is_named_and_left_out(tmp_path: Path):
    rows = [*published.network(4), published.machine("2026-05__bad", bad=3)]
    (group,) = grouped(tmp_path, rows)
    assert [group.sets[i].name for i in group.faulty] == ["2026-05__bad"]
    assert len(group.faults) == 4
    for test in group.faults.values():
        assert (test.pattern, test.share) == ("position mod 16 in 0 to 2", 3 / 16)
    (build,) = sound_builds([group])
    assert len(build.sets) == 4
    assert len(build.pairs) == 6
    assert 0.1 < build.honest_size < 0.2
