"""Every approach of the published table, measured; and trained against random weights."""
