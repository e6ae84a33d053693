"""Fixtures of v_hack that studies use too."""

from tests.vhack.conftest import small_svd as small_svd
