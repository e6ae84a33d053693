"""A service that is killed at random moments loses nothing and repeats nothing, of nonces and of
receipts.
"""

import pytest

from tests.end_to_end import killing, storing
from tests.usual import tries

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(900)]


def test_kills_lose_nothing(tmp_path, small_checkpoint):
    outcome = killing.kill_loop(tmp_path, small_checkpoint, kills=tries(20, 8), seed=11)
    print(outcome)
    assert outcome["records"] > 100
    assert outcome["lost_records"] == outcome["repeated_records"] == 0
    assert (
        outcome["undelivered_nonces"]
        == outcome["nonces_in_two_callbacks"]
        == outcome["callbacks_that_changed"]
        == 0
    )
    assert outcome["dead_letters"] == 0
    # The test tested something: callbacks were sent again, and the receiver was in all its moods.
    assert outcome["sent_more_than_once"] > 0
    assert len(outcome["receiver"]) >= 5


def test_six_kills_lose_no_receipt_whose_response_was_received_whole(tmp_path):
    outcome = storing.kill_loop(tmp_path, kills=6, clients=8, seed=3, longest=0.5)
    print(outcome)
    assert {name: outcome[name] for name in storing.MUST_BE_ZERO} == dict.fromkeys(
        storing.MUST_BE_ZERO, 0
    )
    # The test tested something: responses were cut off, and others were deleted.
    assert outcome["receipts"] > 50
    assert min(outcome["interrupted"], outcome["deleted"]) > 0
