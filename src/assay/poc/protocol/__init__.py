"""The protocol: rounds, pipelines, transforms of hidden states, and proof files."""
