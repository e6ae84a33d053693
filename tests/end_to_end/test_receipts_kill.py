"""A service that is killed while it stores receipts has every receipt whose response was received whole."""

import pytest

from tests.end_to_end.storing import MUST_BE_ZERO, kill_loop


@pytest.mark.kill
@pytest.mark.slow
@pytest.mark.timeout(280)
def test_six_kills_lose_no_receipt(tmp_path):
    outcome = kill_loop(tmp_path, kills=6, clients=8, seed=3, longest=0.5)
    print(outcome)
    assert {name: outcome[name] for name in MUST_BE_ZERO} == dict.fromkeys(MUST_BE_ZERO, 0)
    # The test tested something: responses were cut off, and others were deleted.
    assert outcome["receipts"] > 50
    assert outcome["interrupted"] > 0
    assert outcome["deleted"] > 0
