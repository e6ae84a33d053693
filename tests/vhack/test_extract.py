"""From pairs to a basis: what is used, what is held out, what is refused, and when a file is used
again.
"""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch

from assay.errors import DataError, StorageError, UsageError
from assay.vhack import Basis, Pair, PairGradients, extract, split_pairs, weights_digest
from assay.vhack.directions.basis import extract as _extract
from assay.vhack.directions.gradients import svd as _svd
from tests.vhack.adapter import principal_angles
from tests.wordings import refuses


@pytest.fixture(scope="module")
def extracted(small_model, byte_tokenizer, small_pairs, small_svd):
    """A function that extracts: from the pairs but the last two and the small model, unless others
    are given.
    """

    def make(pairs=small_pairs, model=small_model, **how):
        return extract(
            pairs, model, **{"tokenizer": byte_tokenizer, "svd": small_svd, "n_heldout": 2} | how
        )

    return make


@pytest.fixture(scope="module")
def basis(extracted):
    return extracted()


def test_a_basis_is_made_of_the_differences(gradients_of, small_pairs, small_svd, basis):
    sides = ([pair.samples()[side] for pair in small_pairs[:6]] for side in (0, 1))
    wanted = PairGradients(*(gradients_of(chosen=side) for side in sides)).basis()
    assert list(basis.axes) == list(small_svd)
    for name, axes in basis.axes.items():
        assert axes.shape == (6, small_svd[name].rank)
        assert principal_angles(axes[:2], wanted.axes[name][:2]).max() < 1e-3
        assert torch.allclose(basis.singular_values[name], wanted.singular_values[name], rtol=1e-3)


def test_the_origin_says_what_it_was_made_from(small_model, small_pairs, basis):
    origin = basis.origin
    assert origin.pairs == tuple(pair.key for pair in small_pairs[:6])
    assert origin.groups == tuple(pair.group for pair in small_pairs[:6])
    assert origin.weights == weights_digest(small_model)
    assert (origin.model, origin.dtype, origin.factors) == (
        small_model.reference,
        "float32",
        "float32",
    )
    assert (origin.rank, origin.top_k, origin.tau_axis, origin.method) == (None, 12, 0.0, "lda")
    assert origin.skipped == ()


def test_a_model_brings_its_own_tokenizer(extracted, small_model, byte_tokenizer, basis):
    again = extracted(model=replace(small_model, tokenizer=byte_tokenizer), tokenizer=None)
    assert all(torch.equal(axes, basis.axes[name]) for name, axes in again.axes.items())


def test_a_token_without_a_row_is_refused_before_the_first_decomposition(
    extracted, small_model, small_pairs, byte_tokenizer
):
    larger = copy.deepcopy(byte_tokenizer)
    larger.add_tokens([f"<{number}>" for number in range(300)])
    odd = replace(small_pairs[0], prompt="<299> x")
    steps = []
    with refuses(UsageError, "a token without a row is refused before the first decomposition"):
        extracted(
            [odd, *small_pairs[1:]],
            model=small_model,
            tokenizer=larger,
            svd=None,
            progress=lambda *told: steps.append(told),
        )
    assert not steps


def test_whole_groups_are_held_out(small_pairs):
    used, held = split_pairs(small_pairs)
    assert {pair.group for pair in held} == {"group 3"}
    assert len(used) == 6
    used, held = split_pairs(small_pairs, heldout_groups=["group 0", "group 2"])
    assert {pair.group for pair in used} == {"group 1", "group 3"}
    assert sorted(used + held, key=small_pairs.index) == small_pairs
    one_group = [replace(pair, group="all") for pair in small_pairs]
    assert split_pairs(one_group) == (one_group, [])


def test_as_many_groups_are_held_out_as_a_sixth_of_the_pairs_takes():
    pairs = [Pair("p", f"h{n}", f"c{n}", group=f"g{n}") for n in range(12)]
    assert [pair.group for pair in split_pairs(pairs)[1]] == ["g10", "g11"]
    many = [Pair("p", f"h{n}", f"c{n}", group=f"g{n // 2}") for n in range(60)]
    assert len(split_pairs(many[:-2])[1]) == 10
    assert len(split_pairs(many)[1]) == 20


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_heldout": 8}, "8 of 8 pairs"),
        ({"n_heldout": -1}, "-1 of 8 pairs"),
        ({"heldout_groups": ["nobody"]}, "group 'nobody' is not there"),
        ({"heldout_groups": [f"group {n}" for n in range(4)]}, "no pair left"),
        ({"n_heldout": 1, "heldout_groups": ["group 0"]}, "both a number and groups"),
    ],
)
def test_splits_that_cannot_be_made_are_refused(small_pairs, wrong, message):
    with pytest.raises(UsageError, match=message):
        split_pairs(small_pairs, **wrong)


def test_a_pair_with_equal_sides_is_skipped_and_reported(extracted, small_pairs, basis):
    same = Pair("def f():", "\n    pass\n", "\n    pass\n", group="group 9")
    found = extracted([same, *small_pairs])
    assert found.origin.skipped == (same.key,)
    assert found.origin.pairs == basis.origin.pairs
    assert all(torch.allclose(axes, basis.axes[name]) for name, axes in found.axes.items())


def test_pairs_that_cannot_be_used_are_named(extracted, small_pairs):
    with refuses(DataError, "pairs that cannot be used are named"):
        extracted([Pair(f"p{n}", "x", "x", group="g") for n in range(3)], n_heldout=0)
    again = replace(small_pairs[2], group="elsewhere", tags=("new",))
    with refuses(DataError, "pairs that cannot be used are named, 2"):
        extracted([*small_pairs, again])
    empty = [
        replace(pair, hack="") if index == 4 else pair for index, pair in enumerate(small_pairs)
    ]
    # The name counts all pairs, those that are held out too.
    with refuses(DataError, "pairs that cannot be used are named, 3"):
        extracted(empty, n_heldout=None, heldout_groups=["group 1"])


@pytest.mark.parametrize(
    "wrong", [{"method": "pca"}, {"top_k": 0}, {"tau_axis": 2.0}, {"rank": 0}, {"n_heldout": 6}]
)
def test_wrong_settings_are_refused_before_any_work(monkeypatch, extracted, wrong):
    monkeypatch.setattr(_extract, "pair_gradients", None)
    with pytest.raises(UsageError):
        extracted(**wrong)


def test_progress_counts_decompositions_and_samples(extracted, small_svd):
    for svd, steps in ((None, 21 + 12), (small_svd, 12)):
        seen = []
        extracted(svd=svd, progress=lambda *at, seen=seen: seen.append(at))
        assert {total for _, total in seen} == {steps}
        done = [at for at, _ in seen]
        assert done == sorted(done)
        assert done[-1] == steps
        assert done[0] == 1 or svd is not None


def test_truncation_reports_what_it_keeps(extracted, gradients_of, small_pairs, small_svd, cut_svd):
    shares = {}
    for rank in (4, 16, 64):
        basis = extracted(rank=rank)
        assert all(
            axes.shape[1] == min(rank, small_svd[name].rank) for name, axes in basis.axes.items()
        )
        assert basis.origin.rank == rank
        shares[rank] = basis.origin.captured
    full = gradients_of(chosen=small_pairs[0].samples())
    kept = sum(float(rows[:, :4].square().sum()) for rows in full.values())
    assert shares[4] == pytest.approx(
        kept / sum(float(rows.square().sum()) for rows in full.values()), rel=1e-4
    )
    assert shares[4] < shares[16] < shares[64] == 1.0
    assert extracted(svd=cut_svd, rank=16).origin.rank == cut_svd.rank


def test_every_pass_saves_memory_as_asked(monkeypatch, extracted):
    """That over the first pair, for the share that a rank holds, took what it wanted."""
    passes = []
    real = _extract.per_sample_gradients

    def watched(*arguments, **options):
        passes.append((options["checkpointing"], options["max_tokens"]))
        return real(*arguments, **options)

    monkeypatch.setattr(_extract, "per_sample_gradients", watched)
    extracted(rank=4, checkpointing=True, max_tokens=99)
    assert passes == [(True, 99)] * 2


@pytest.fixture
def young_objects_alone():
    """Collect no object that is older than the test: there may be millions of them by now."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.usefixtures("young_objects_alone")
def test_truncated_factors_are_made_without_all_full_ones(monkeypatch, extracted):
    """Of 21 matrices at most three, an eighth, have full factors at any time, and the basis is the
    same.
    """
    wanted = extracted(rank=16)
    made = weakref.WeakSet()
    most = []
    real = _svd.factorise
    steps = []

    def watched(*arguments, **options):
        factors = real(*arguments, **options)
        made.add(factors)
        gc.collect()
        most.append(len(made))
        return factors

    monkeypatch.setattr(_svd, "factorise", watched)
    found = extracted(rank=16, svd=None, progress=lambda *at: steps.append(at))
    assert len(most) == 21
    assert max(most) <= 3
    assert found.origin.captured == pytest.approx(wanted.origin.captured, rel=1e-6)
    assert found.origin == replace(wanted.origin, captured=found.origin.captured)
    assert all(torch.equal(axes, wanted.axes[name]) for name, axes in found.axes.items())
    assert list(found.axes) == list(wanted.axes)
    assert [done for done, _ in steps if done <= 21] == list(range(1, 22))


def test_a_missing_file_is_extracted_and_an_existing_one_used(
    monkeypatch, tmp_path, extracted, small_model
):
    path = tmp_path / "basis.safetensors"
    made = extracted(path=path)
    monkeypatch.setattr(_extract, "pair_gradients", None)
    again = extracted(path=path)
    assert all(torch.equal(axes, made.axes[name]) for name, axes in again.axes.items())
    # Without factors at hand, their dtype is what it would be.
    extracted(path=path, svd=None)
    assert all(len(axes) == 6 for axes in Basis.load(path, small_model).axes.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "svd"}, "other method"),
        ({"rank": 7}, "other rank"),
        ({"factors": "bfloat16", "svd": None}, "other factors"),
        ({"n_heldout": 3}, "other pairs"),
    ],
)
def test_a_stale_file_is_refused(tmp_path, extracted, basis, change, message):
    basis.save(tmp_path / "basis.safetensors")
    with pytest.raises(DataError, match=message):
        extracted(path=tmp_path / "basis.safetensors", **change)


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, extracted):
    monkeypatch.setattr(_extract, "pair_gradients", None)
    with refuses(StorageError, "a file that cannot be written is refused before the work"):
        extracted(path=tmp_path / "missing" / "basis.safetensors")


def test_a_basis_of_other_weights_is_refused(tmp_path, small_model, basis):
    path = tmp_path / "basis.safetensors"
    basis.save(path)
    Basis.load(path, small_model)
    Basis.load(path, small_model.module)
    changed = copy.deepcopy(small_model.module)
    with torch.no_grad():  # not a target, but the gradients depend on it
        changed.model.norm.weight[0] += 1e-6
    with refuses(DataError, "a basis of other weights is refused"):
        Basis.load(path, changed)


def test_the_digest_of_weights_sees_values_and_dtype(small_model):
    changed = copy.deepcopy(small_model.module)
    assert weights_digest(changed) == weights_digest(small_model)
    assert weights_digest(changed.to(torch.bfloat16)) != weights_digest(small_model)


def test_the_key_of_a_pair_is_what_it_says():
    pair = Pair("p", "h", "c", "g")
    assert pair.key == Pair("p", "h", "c", "another group", ("tag",)).key
    assert len({pair.key, Pair("p", "c", "h", "g").key, Pair("ph", "", "c", "g").key}) == 3
