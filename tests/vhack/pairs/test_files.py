import json

import pytest

from assay.errors import DataError, UsageError
from assay.vhack import Pair
from assay.vhack.pairs import find_pairs, generate_pairs, read_pairs, write_pairs
from assay.vhack.pairs.pairs import authored_pairs, check_pairs
from tests.wordings import refuses

GOOD = {"prompt": "p", "hack": "h", "clean": "c", "group": "g", "tags": ["a", "b"]}


def written(tmp_path, *records):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_what_was_written_is_read_back(tmp_path):
    pairs = [Pair("p\n", "h ü", "c", "g", ("a",)), Pair("p", "h", "c", "g2")]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({**GOOD, "clean": " \n"}, "line 2: clean empty"),
        ({**GOOD, "group": ""}, "line 2: group empty"),
        ({**GOOD, "clean": "h"}, "line 2: hack and clean are the same"),
        (GOOD, "line 2: the same pair as .*line 1"),
        ({**GOOD, "note": 1}, "line 2: note: Unexpected"),
        ({"prompt": "p", "hack": "h", "group": "g"}, "line 2: clean: Field required"),
        ({**GOOD, "hack": 1}, "line 2: hack.*: Input should be a valid string"),
        ({**GOOD, "tags": "a"}, "line 2: tags: Input should be a valid tuple"),
        ("[]", "line 2: a list"),
        (
            {"prompt": "p", "chosen": "c", "rejected": "h"},
            "line 2: preference data with chosen and rejected",
        ),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path, bad, match):
    with pytest.raises(DataError, match=match):
        read_pairs(written(tmp_path, GOOD, bad))


def test_of_a_list_of_wrong_tags_the_first_is_looked_at(tmp_path):
    with pytest.raises(DataError) as caught:
        read_pairs(written(tmp_path, GOOD | {"tags": [1] * 9}))
    assert caught.value.__context__.__context__.error_count() == 1


def test_an_empty_file_and_a_missing_one_are_refused(tmp_path):
    with refuses(DataError, "an empty file and a missing one are refused"):
        read_pairs(written(tmp_path))
    with refuses(DataError, "an empty file and a missing one are refused, 2"):
        read_pairs(tmp_path / "absent.jsonl")


def test_nothing_is_written_for_pairs_that_could_not_be_read(tmp_path):
    with refuses(DataError, "nothing is written for pairs that could not be read"):
        write_pairs(tmp_path / "out.jsonl", [Pair("p", "h", "c", "g"), Pair("p", "h", "h", "g")])
    assert not (tmp_path / "out.jsonl").exists()


def test_check_pairs_names_pairs_by_index_and_group():
    with refuses(DataError, "check pairs names pairs by index and group"):
        check_pairs([Pair("p", "h", "c", "g"), Pair("p", "h", "c", "g")])


def test_the_authored_set_has_two_pairs_for_each_of_eight_mechanisms():
    pairs = authored_pairs()
    assert sorted(pair.group for pair in pairs) == sorted(2 * list({pair.group for pair in pairs}))
    assert len({pair.group for pair in pairs}) == 8
    assert len({tag for pair in pairs for tag in pair.tags if tag.startswith("task:")}) == 16


def test_pairs_are_found_by_name(tmp_path):
    assert find_pairs("authored") == authored_pairs()
    assert find_pairs("generated:5:3") == generate_pairs(5, seed=3)
    assert len(find_pairs(str(written(tmp_path, GOOD)))) == 1
    for numbers in ("many", "99999999999", "5:" + "9" * 5000, "0"):
        for name in ("generated", "environment", "exploits"):
            with refuses(UsageError, "pairs are found by name"):
                find_pairs(f"{name}:{numbers}")


@pytest.mark.parametrize(
    ("reference", "meant"),
    [
        ("generate:48", "generated:48"),
        ("Exploit:9:2", "exploits:9:2"),
        ("author", "authored"),
        ("generated", "generated:48"),
    ],
)
def test_a_name_that_is_nearly_one_is_answered_with_it(tmp_path, monkeypatch, reference, meant):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        find_pairs(reference)
    assert caught.value.do == f"did you mean {meant}?"
    (tmp_path / reference).write_text(json.dumps(GOOD) + "\n")
    assert len(find_pairs(reference)) == 1
