"""A year of a network under each verdict rule: false accusations, time to catch cheaters, and junk that is paid."""
