"""Results in and out: strict JSON Lines, crash-safe files, self-contained HTML, and where a result
comes from.
"""
