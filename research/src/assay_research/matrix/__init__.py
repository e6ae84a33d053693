"""The published matrix of models, modes, blocks and keys, against live services."""
