"""Many training runs at once: arms, seeds and optimisers compared on a small model."""
