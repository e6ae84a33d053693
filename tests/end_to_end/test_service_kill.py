"""A service that is killed at random moments loses nothing and repeats nothing."""

import pytest

from tests.end_to_end.killing import kill_loop


@pytest.mark.kill
@pytest.mark.slow
@pytest.mark.timeout(280)
def test_twenty_kills_lose_nothing(tmp_path, small_checkpoint):
    outcome = kill_loop(tmp_path, small_checkpoint, kills=20, seed=11)
    print(outcome)
    assert outcome["records"] > 100
    assert outcome["lost_records"] == outcome["repeated_records"] == 0
    assert outcome["undelivered_nonces"] == outcome["nonces_in_two_callbacks"] == outcome["callbacks_that_changed"] == 0
    assert outcome["dead_letters"] == 0
    # The test tested something: callbacks were sent again, and the receiver was in all its moods.
    assert outcome["sent_more_than_once"] > 0
    assert len(outcome["receiver"]) >= 5
