"""Seeds of responses: no two share a text, and every field counts."""

import pytest

from assay.errors import UsageError
from assay.poc.responses import ResponseSeed

FIELDS = {
    "user_seed": "u",
    "request_id": "r1",
    "public_key": "K",
    "digest": "0" * 64,
    "block_hash": "B",
    "index": 0,
}
SEED = ResponseSeed(**FIELDS)


def test_the_text_is_that_of_the_format():
    assert SEED.text() == "17:assay.responses/16:tokens1:u2:r11:K64:" + "0" * 64 + "1:B1:0"
    assert SEED.text("sketch") == SEED.text().replace("6:tokens", "6:sketch")


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_changes_every_seed(name: str):
    others = FIELDS | {
        "user_seed": "v",
        "request_id": "r2",
        "public_key": "L",
        "block_hash": "C",
        "index": 1,
    }
    changed = ResponseSeed(**FIELDS | {name: (others | {"digest": "1" * 64})[name]})
    for stream in ("tokens", "sketch"):
        assert not set(SEED.step_seeds(range(64), stream)) & set(
            changed.step_seeds(range(64), stream)
        )


def test_fields_cannot_be_shifted_into_each_other():
    one = ResponseSeed(**FIELDS | {"user_seed": "ab", "request_id": "c"})
    other = ResponseSeed(**FIELDS | {"user_seed": "a", "request_id": "bc"})
    spoofed = ResponseSeed(**FIELDS | {"user_seed": "", "request_id": "0:2:ab1:c"})
    assert len({one.text(), other.text(), spoofed.text()}) == 3


IMPOSSIBLE = {
    "request_id": ("", "x" * 1025, "a\nb", None),
    "user_seed": (None, "\x00"),
    "public_key": ("",),
    "block_hash": ("",),
    "digest": ("A" * 64, "0" * 63, 7),
    "index": (-1, 2**16, True, 1.0),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in IMPOSSIBLE for value in IMPOSSIBLE[name]]
)
def test_what_cannot_be_part_of_a_text_is_refused(name: str, value: object):
    with pytest.raises(UsageError, match=name):
        ResponseSeed(**FIELDS | {name: value})


def test_a_client_may_give_no_seed():
    assert "0:2:r1" in ResponseSeed(**FIELDS | {"user_seed": ""}).text()
