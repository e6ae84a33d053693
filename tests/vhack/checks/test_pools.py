"""Two pools of samples that are not paired: what is scored, what is refused, and that noise does
not pass.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from assay.cli.vhack import vhack
from assay.errors import DataError, UsageError
from assay.stats import auroc
from assay.vhack import Pair, Sample, cin, extract, per_sample_gradients
from assay.vhack.directions.checks import CheckSettings, check, check_two_pools, read_pool
from assay.vhack.directions.checks.pools import PoolSample, check_unpaired
from tests.wordings import refuses

QUICK = CheckSettings(k_use=3, n_flips=39, n_null=19, n_resamples=60)
WORDS = ("add", "sub", "mul", "div", "power", "root", "sign", "floor", "ceil", "mean")


def pairs_of(words):
    """Pairs whose two sides have the same length."""
    return [
        Pair(
            f"def test_{word}():\n",
            f"    print('{word}({n}): {n}')\n",
            f"    assert {word}({n}) == {n}\n",
            group=word,
        )
        for word in words
        for n in range(2)
    ]


def pools_of(pairs):
    sides = [pair.samples() for pair in pairs]
    return [
        [PoolSample(side[i], pair.group) for side, pair in zip(sides, pairs, strict=True)]
        for i in (0, 1)
    ]


@pytest.fixture(scope="module")
def basis(small_model, byte_tokenizer, small_svd):
    return extract(
        pairs_of(WORDS[:4]), small_model, tokenizer=byte_tokenizer, svd=small_svd, n_heldout=0
    )


@pytest.fixture(scope="module")
def pools():
    return pools_of(pairs_of(WORDS[4:]))


def scored(pools, model, basis, tokenizer, settings=QUICK, **options):
    return check_two_pools(*pools, model, basis, settings=settings, tokenizer=tokenizer, **options)


@pytest.mark.slow
def test_the_value_is_the_auroc_of_cin_written_out(
    small_model, byte_tokenizer, small_svd, basis, pools
):
    report = scored(pools, small_model, basis, byte_tokenizer, svd=small_svd)
    used = basis.slice(QUICK.k_use)

    def scores(pool, two_sided):
        samples = [one.sample for one in pool]
        found = per_sample_gradients(samples, small_model, tokenizer=byte_tokenizer, svd=small_svd)
        each = [cin(found[name], axes, two_sided=two_sided) for name, axes in used.axes.items()]
        return torch.stack(each).mean(dim=0).numpy()

    hack, clean = (scores(pool, two_sided=False) for pool in pools)
    assert np.allclose(report.hack, hack, atol=1e-5)
    assert np.allclose(report.clean, clean, atol=1e-5)
    assert report.check.measured.value == pytest.approx(auroc(hack, clean))
    both = [scores(pool, two_sided=True) for pool in pools]
    assert report.check.details["auroc_two_sided"] == pytest.approx(auroc(*both))
    lengths = [[len(one.sample.completion) for one in pool] for pool in pools]
    assert report.check.details["auroc_length_of_completion_alone"] == max(
        auroc(*lengths), auroc(*lengths[::-1])
    )
    assert set(report.check.nulls) == {"labels swapped", "Haar"}
    assert report.hack_groups == tuple(one.group for one in pools[0])
    assert json.loads(json.dumps(report.as_dict()))["schema"] == "assay.vhack.pools/1"


@pytest.mark.slow
def test_hacks_pass_and_the_same_pools_the_other_way_fail(
    small_model, byte_tokenizer, small_svd, basis, pools
):
    enough = replace(
        QUICK, k_use=5, n_null=99
    )  # random axes tell sides as plain as these apart now and then
    found = scored(pools, small_model, basis, byte_tokenizer, enough, svd=small_svd)
    assert (found.check.verdict, found.exit_code) == ("pass", 0)
    turned = scored(pools[::-1], small_model, basis, byte_tokenizer, svd=small_svd)
    assert (turned.check.verdict, turned.exit_code) == ("fail", 1)
    assert [one.auroc.value for one in found.detectors.results if one.name == "cin-lda"] == [
        found.check.measured.value
    ]
    few = scored([pool[:4] for pool in pools], small_model, basis, byte_tokenizer, svd=small_svd)
    assert (few.check.verdict, few.exit_code) == ("undecided", 2)


@pytest.mark.slow
def test_pools_that_the_length_tells_apart_as_well_fail(
    small_model, byte_tokenizer, small_svd, basis, pools
):
    longer = [
        PoolSample(replace(one.sample, completion=one.sample.completion + "\n" * 9), one.group)
        for one in pools[1]
    ]
    enough = replace(QUICK, k_use=5, n_null=99)
    found = scored([pools[0], longer], small_model, basis, byte_tokenizer, enough, svd=small_svd)
    assert (found.check.verdict, found.exit_code) == ("fail", 1)
    assert "the length alone" in found.check.reason


def test_random_bases_that_do_as_well_make_it_fail():
    generator = np.random.default_rng(0)
    scores = [generator.standard_normal(20) + shift for shift in (4.0, 0.0)]
    groups = [f"g{index}" for index in range(20)]
    verdicts = [
        check_unpaired(*scores, groups, groups, QUICK, nulls=nulls).verdict
        for nulls in ({}, {"Haar": [0.5] * 19}, {"Haar": [1.0] * 19})
    ]
    assert verdicts == ["pass", "pass", "fail"]
    # A value above every null, of which only the interval is too wide, may be shown by more pairs.
    near = [generator.standard_normal(20) + shift for shift in (1.5, 0.0)]
    wide = check_unpaired(*near, groups, groups, QUICK, nulls={"Haar": [auroc(*near) - 0.02] * 19})
    assert (wide.verdict, wide.reason[-9:]) == ("undecided", "add pairs")


def test_very_many_groups_have_a_smallest_p_value_of_nearly_zero():
    groups = [f"g{index}" for index in range(1400)]
    settings = replace(QUICK, n_resamples=2)
    made = check_unpaired(np.arange(700.0), np.arange(700.0), groups[:700], groups[700:], settings)
    assert made.verdict == "fail"


@pytest.mark.slow
def test_groups_of_the_basis_are_left_out(small_model, byte_tokenizer, small_svd, basis, pools):
    seen = pools_of(pairs_of(WORDS[:2]))
    both = [[*seen[side], *pools[side]] for side in (0, 1)]
    report = scored(both, small_model, basis, byte_tokenizer, svd=small_svd)
    assert report.left_out == 8
    assert report.hack == scored(pools, small_model, basis, byte_tokenizer, svd=small_svd).hack
    with refuses(DataError, "groups of the basis are left out"):
        scored([seen[0], pools[1]], small_model, basis, byte_tokenizer, svd=small_svd)


def test_pools_that_hold_the_pairs_of_the_basis_under_other_names_are_found_out(
    small_model, byte_tokenizer, small_svd
):
    few = pairs_of(WORDS[:4])[::2]
    made = extract(few, small_model, tokenizer=byte_tokenizer, svd=small_svd, n_heldout=0)
    own = [[replace(one, group=f"other {one.group}") for one in pool] for pool in pools_of(few)]
    with refuses(
        DataError, "pools that hold the pairs of the basis under other names are found out"
    ):
        scored(own, small_model, made, byte_tokenizer, svd=small_svd)


def test_a_sample_in_both_pools_and_another_model_are_refused(
    small_model, byte_tokenizer, small_svd, basis, pools
):
    with refuses(DataError, "a sample in both pools and another model are refused"):
        scored(
            [pools[0], [*pools[1], pools[0][0]]], small_model, basis, byte_tokenizer, svd=small_svd
        )
    other = replace(basis, origin=replace(basis.origin, weights="0" * 64))
    with refuses(DataError, "a sample in both pools and another model are refused, 2"):
        scored(pools, small_model, other, byte_tokenizer, svd=small_svd)


def test_factors_of_another_rank_are_refused(small_model, byte_tokenizer, cut_svd, basis, pools):
    with pytest.raises(UsageError):
        scored(pools, small_model, basis, byte_tokenizer, svd=cut_svd)


@pytest.mark.slow
def test_a_truncated_basis_is_scored_and_checked_in_its_own_coordinates(
    small_model, byte_tokenizer, pools
):
    asked = {"tokenizer": byte_tokenizer, "n_heldout": 0}
    made = extract(pairs_of(WORDS[:4]), small_model, rank=16, method="svd", **asked)
    steps = []
    report = scored(pools, small_model, made, byte_tokenizer, progress=lambda *at: steps.append(at))
    assert steps == sorted(steps)
    assert {total for _, total in steps} == {steps[-1][0]}
    assert report.check.measured.value > 0.8
    checked = check(
        pairs_of(WORDS[4:]), small_model, basis=made, tokenizer=byte_tokenizer, settings=QUICK
    )
    assert np.allclose(checked.hack, report.hack, atol=1e-5)


LINES = [
    {"prompt": "a", "completion": "b", "group": "g"},
    {"prompt": "a", "completion": "c", "tokens": [1, 2], "logprobs": [-0.1, -0.2]},
    {"prompt": "a", "completion": "d", "group": None},
    {"prompt": "other", "completion": "d"},
]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_pool_is_read_and_the_group_of_a_sample_is_its_prompt_where_it_has_none(tmp_path):
    found = read_pool(write(tmp_path / "pool.jsonl", LINES))
    assert [one.sample for one in found] == [
        Sample(line["prompt"], line["completion"]) for line in LINES
    ]
    assert found[0].group == "g"
    assert found[1].group == found[2].group != found[3].group
    assert found[1].group.startswith("prompt ")


def test_a_draw_of_a_pool_depends_on_the_seed_alone(tmp_path):
    path = write(
        tmp_path / "pool.jsonl", [{"prompt": "a", "completion": str(n)} for n in range(50)]
    )
    first = read_pool(path, most=5, seed=1)
    assert first == read_pool(path, most=5, seed=1) != read_pool(path, most=5, seed=2)
    assert len(set(first)) == 5
    assert len(read_pool(path, most=60)) == 50


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "a"},
        {"prompt": "a", "completion": ""},
        {"prompt": 1, "completion": "b"},
        {"prompt": "a", "completion": "b", "group": ""},
        {"prompt": "a", "completion": "b", "group": 7},
        {"prompt": "a", "hack": "b", "clean": "c", "group": "g"},
    ],
)
def test_a_line_that_is_no_sample_is_named(tmp_path, bad):
    with refuses(DataError, "a line that is no sample is named"):
        read_pool(write(tmp_path / "pool.jsonl", [LINES[0], bad]))


def test_an_empty_pool_is_refused(tmp_path):
    with refuses(DataError, "an empty pool is refused"):
        read_pool(write(tmp_path / "pool.jsonl", []))


@pytest.mark.slow
def test_the_command_scores_two_files(
    monkeypatch, tmp_path, small_model, byte_tokenizer, basis, pools
):
    monkeypatch.setattr(
        "assay.models.load_model",
        lambda *_, **__: replace(small_model, tokenizer=byte_tokenizer),
    )
    basis.save(tmp_path / "basis.safetensors")
    for name, pool in zip(("hack", "clean"), pools, strict=True):
        lines = [
            {"prompt": o.sample.prompt, "completion": o.sample.completion, "group": o.group}
            for o in pool
        ]
        write(tmp_path / f"{name}.jsonl", lines)
    asked = ["pools", "--model", "reference:qwen3", "--basis", tmp_path / "basis.safetensors"]
    asked += [
        "--hack",
        tmp_path / "hack.jsonl",
        "--clean",
        tmp_path / "clean.jsonl",
        "-o",
        tmp_path / "result.json",
    ]
    result = CliRunner().invoke(vhack, [*map(str, asked), "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["verdict"] == "pass"
    assert values == json.loads((tmp_path / "result.json").read_text())
    shown = CliRunner().invoke(vhack, [*map(str, asked)]).stdout
    assert "pass: every part of the rule holds" in shown
    assert "AUROC of cin" in shown
    assert "ngrams" in shown
