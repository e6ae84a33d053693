"""The run store of experiments, and what all of them share."""
