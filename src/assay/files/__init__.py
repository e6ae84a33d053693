"""Files that people and programs write: strict JSON, TOML, tensors, and one SQLite database."""
