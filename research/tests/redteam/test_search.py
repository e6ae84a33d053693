import pytest
from assay_research.redteam import run, tables
from assay_research.redteam.partial import PartialForward
from assay_research.redteam.run import RedteamPlan, strategies
from assay_research.redteam.tables import SAVED


@pytest.mark.parametrize("read", [[31], [3, 9, 20, 28], list(range(32))])
def test_every_strategy_saves_what_it_must(read, small_model, guesses):
    found = dict(strategies(read, 32, small_model.num_layers))
    costs = {name: PartialForward(small_model, shortcut, guesses).cost for name, shortcut in found.items()}
    # The small model has three layers and the guesses are a larger part of it: the margin is theirs.
    assert costs["least useful dropped"] <= 1 - SAVED + 0.02
    assert costs["last dropped"] <= 1 - SAVED + 0.02
    assert len(found) >= 7


def test_unread_positions_go_first():
    depths = dict(strategies([5, 20], 32, 3))["least useful dropped"].depth
    gone = [t for t, depth in enumerate(depths) if depth == 0]
    assert min(gone) > 20, "nothing after the last read position is of use"
    later = dict(strategies([5, 31], 32, 3))["least useful dropped"].depth
    assert [t for t, depth in enumerate(later) if depth == 0] == list(range(6, 15)), "then the farthest from a read one"


def plan(*dtypes: str) -> RedteamPlan:
    return RedteamPlan(models=("one", "other"), dtypes=dtypes, searched=3, device="cpu")


def test_each_number_format_of_the_validator_has_a_search_of_its_own():
    found = {key: cell.args[0] for key, cell in run._cells(plan("bfloat16", "float16", "float8")) if "search" in key}
    assert {key: (field.reference, field.dtype) for key, field in found.items()} == {
        "one/search in float32": ("one", "bfloat16"),
        "one/search in float8": ("one", "float8"),
        "other/search in float32": ("other", "bfloat16"),
        "other/search in float8": ("other", "float8"),
    }
    alone = [key for key, _ in run._cells(plan("float8")) if "search" in key]
    assert alone == ["one/search in float8", "other/search in float8"]


def measured(*dtypes: str, searched: tuple[str | None, ...]) -> list[dict]:
    """Cells of one model that say where each search was; None as in runs of earlier versions."""
    rows = [{"positions": 1, "strategy": "a", "error_mean": 1.0, "cost": 0.5}]
    cells: list[dict] = [{"kind": "claims", "model": "m", "dtype": dtype} for dtype in dtypes]
    cells += [
        {"kind": "honest", "model": "m", "dtype": dtype, "presets": {"hardened": {"error_mean": size}}}
        for size, dtype in enumerate(dtypes, 1)
    ]
    found = {"kind": "search", "model": "m", "rows": rows}
    return cells + [found | ({"format": where} if where else {}) for where in searched]


def test_a_table_shows_the_search_of_its_dtype_only():
    cells = measured("bfloat16", "float8", searched=("float32", "float8"))
    assert tables.searches(cells, "m", "bfloat16") == [cells[-2]]
    assert tables.searches(cells, "m", "float8") == [cells[-1]]
    assert tables.search_table(cells, "m", "float8")[1] == [[1, "a", "0.50", "1.000", "0.5"]]


def test_an_earlier_search_that_does_not_say_its_format_is_shown_where_there_is_one_only():
    assert len(tables.searches(measured("bfloat16", "float16", searched=(None,)), "m", "float16")) == 1
    mixed = measured("bfloat16", "float8", searched=(None,))
    assert tables.searches(mixed, "m", "bfloat16") == tables.searches(mixed, "m", "float8") == []
