"""Pages of results: HTML without scripts from outside, figures, and where a result came from."""
