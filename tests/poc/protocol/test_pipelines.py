import pytest

from assay.errors import UsageError
from assay.poc import get_pipeline


def test_presets_are_what_the_network_runs():
    poc = get_pipeline("poc-2.0")
    assert [(step.name, step.count) for step in poc.hidden] == [("signs", 0), ("unit", 0), ("reflect", 8)]
    assert (poc.head, poc.output, poc.output_size(256, 4096)) == ("random", "distance", 8192)
    artifact = get_pipeline("artifact")
    assert [(step.name, step.count) for step in artifact.hidden] == [
        ("unit", 0),
        ("pick", 12),
        ("rotate", 11),
        ("unit", 0),
    ]
    assert (artifact.output, artifact.vector_size, artifact.output_size(256, 4096)) == ("vector", 12, 12)


def test_output_size_follows_the_head():
    assert get_pipeline("permutation").output_size(256, 4096) == 4096
    assert get_pipeline("layer-signs").per_nonce is False
    assert get_pipeline("end-normalize").per_nonce is False
    assert get_pipeline("permutation").per_nonce is True


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean artifact"):
        get_pipeline("artefact")
    with pytest.raises(UsageError, match="preset 'x'"):
        get_pipeline("x")
