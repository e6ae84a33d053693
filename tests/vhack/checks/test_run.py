import json
from dataclasses import replace

import pytest
import torch

from assay.errors import DataError, UsageError
from assay.vhack import Pair, extract
from assay.vhack.directions.checks import CheckReport, CheckSettings, check, check_gradients
from assay.vhack.directions.checks.check_page import make_page
from assay.vhack.directions.checks.check_report import CHECKS
from assay.vhack.directions.checks.five_checks import check_stability, haar_scores
from assay.vhack.directions.checks.folds import cross_fit
from assay.vhack.names import METHODS
from tests.wordings import refuses


@pytest.fixture(scope="module")
def report(gradients, quick):
    return check_gradients(gradients(5, strength=4.0), settings=quick)


@pytest.fixture(scope="module")
def pairs():
    """Twelve pairs of six groups, short enough for the small model."""
    return [
        Pair(
            f"def test_{word}():\n",
            f"    print('{word} {n}')\n",
            f"    assert {word}({n}) == {n}\n",
            group=word,
        )
        for word in ("add", "sub", "mul", "power", "root", "sign")
        for n in (3, 4)
    ]


def test_every_check_states_rule_value_interval_null_and_verdict(report):
    assert [made.name for made in report.checks] == list(CHECKS)
    for made in report.checks:
        assert made.rule.startswith("Passes if")
        assert made.measured.low <= made.measured.value <= made.measured.high
        assert made.nulls
        assert all(made.nulls.values())
        assert all(0 < p <= 1 for p in made.p_values.values())
        assert made.verdict == "pass"
    assert (report.verdict, report.exit_code) == ("pass", 0)
    assert set(report["random_null"].nulls) == {"Haar", "clean-clean", "labels swapped"}


def test_the_same_seed_gives_the_same_report(report, gradients, quick):
    assert check_gradients(gradients(5, strength=4.0), settings=quick) == report
    assert check_gradients(gradients(5, strength=4.0), settings=replace(quick, seed=1)) != report


def test_a_report_survives_json(report):
    text = json.dumps(report.as_dict(), allow_nan=False)
    assert json.loads(text)["schema"] == "assay.vhack.check/1"
    assert CheckReport.from_dict(json.loads(text)) == report


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "other"},
        {"checks": [{}]},
        {"checks": []},
        {"hack": []},
        {"hack": ["nan"]},
        {"hack": [1e308], "clean": [-1e308]},
    ],
)
def test_a_report_of_another_form_is_refused(report, change):
    with refuses(DataError, "a report of another form is refused"):
        CheckReport.from_dict({**report.as_dict(), **change})


def test_a_report_that_no_page_can_show_is_refused(report):
    record = json.loads(json.dumps(report.as_dict()))
    with refuses(UsageError, "a report that no page can show is refused"):
        CheckReport.from_dict({**record, "settings": {"alpha": 5e-324}})
    record["checks"][2]["nulls"]["Haar"] = []
    with refuses(DataError, "a report that no page can show is refused, 2"):
        CheckReport.from_dict(record)


def test_the_page_shows_every_check(report):
    html = make_page(report).render()
    for made in report.checks:
        assert made.title in html
    assert html.count("<svg") == 1
    assert 'class="badge pass"' in html
    again = make_page(CheckReport.from_dict(json.loads(json.dumps(report.as_dict())))).render()
    assert html.split("<footer>")[0] == again.split("<footer>")[0]


def test_a_given_basis_is_scored_on_what_it_has_not_seen(gradients, quick):
    gradients_ = gradients(0, strength=5.0, n_groups=14)
    basis = gradients_.basis(keep=list(range(21)))
    report = check_gradients(gradients_, basis=basis, settings=quick)
    assert set(report.groups) == {f"g{i}" for i in range(7, 14)}
    assert report.verdict == "pass"


def test_a_given_basis_is_checked_by_its_own_method_and_size(gradients, quick):
    """Whatever the settings say: the nulls and the halves have to be fitted as the basis was."""
    pairs = gradients(0, strength=2.0, n_groups=16)
    reports = {
        method: check_gradients(
            pairs, basis=pairs.basis(method=method, top_k=2, keep=list(range(24))), settings=quick
        )
        for method in METHODS
    }
    assert {report.settings.method for report in reports.values()} == set(METHODS)
    assert {report.settings.k_use for report in reports.values()} == {2}
    stability = {report["stability"].measured.value for report in reports.values()}
    clean = {report["random_null"].nulls["clean-clean"] for report in reports.values()}
    assert len(stability) == len(clean) == 2


@pytest.mark.parametrize("method", METHODS)
def test_bases_of_two_halves_agree_where_there_is_one_axis_and_not_in_noise(
    gradients, quick, method
):
    settings = replace(quick, method=method, k_use=1)
    strong, noise = (
        check_stability(cross_fit(gradients(0, strength=strength), settings)).measured.value
        for strength in (40.0, 0.0)
    )
    assert strong > 0.85
    assert noise < 0.5


def test_clean_clean_bases_drop_weak_axes_as_the_bases_they_are_compared_with(gradients, quick):
    """With one axis left of three, an overlap is a third of that of bases with one axis."""
    pairs = gradients(0, strength=2.0)
    cut = replace(quick, k_use=3, tau_axis=1.0)
    single = replace(quick, k_use=1)
    three, one = (
        check_stability(cross_fit(pairs, settings)).nulls["clean-clean"]
        for settings in (cut, single)
    )
    assert three == pytest.approx([overlap / 3 for overlap in one])


@pytest.mark.slow
def test_from_model_and_pairs(small_model, byte_tokenizer, small_svd, pairs, quick):
    report = check(pairs, small_model, tokenizer=byte_tokenizer, settings=quick, svd=small_svd)
    assert report.origin["groups"] == 6
    basis = extract(
        pairs, small_model, tokenizer=byte_tokenizer, heldout_groups=["root", "sign"], svd=small_svd
    )
    scored = check(
        pairs, small_model, basis=basis, tokenizer=byte_tokenizer, settings=quick, svd=small_svd
    )
    assert set(scored.groups) == {"root", "sign"}
    other = replace(basis, origin=replace(basis.origin, weights="f" * 64))
    early = {"progress": lambda *_: pytest.fail("gradients were taken first")}
    with refuses(DataError, "from model and pairs"):
        check(
            pairs,
            small_model,
            basis=other,
            tokenizer=byte_tokenizer,
            settings=quick,
            svd=small_svd,
            **early,
        )


def test_a_prompt_in_two_groups_is_refused(small_model, byte_tokenizer, pairs):
    shared = [*pairs, replace(pairs[0], hack="    pass\n", group="elsewhere")]
    with refuses(DataError, "a prompt in two groups is refused"):
        check(shared, small_model, tokenizer=byte_tokenizer)


WRONG = {
    "k_use": 0,
    "alpha": 0.0,
    "confidence": 1.0,
    "n_folds": 1,
    "tau_axis": 2.0,
    "n_null": 9,
    "seed": -1,
}


@pytest.mark.parametrize(("name", "value"), (WRONG | {"method": "pca"}).items())
def test_settings_that_cannot_work_are_refused(name, value):
    with pytest.raises(UsageError):
        CheckSettings(**{name: value})


def test_random_axes_point_as_often_to_a_sample_as_away_from_it():
    generator = torch.Generator().manual_seed(0)
    sample = torch.tensor([[1.0, 0.0]])
    scores_BS = haar_scores([sample], torch.ones(1, 1), 1, 1000, generator)
    assert float((scores_BS > 0).double().mean()) == pytest.approx(0.5, abs=0.08)
