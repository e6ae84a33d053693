"""The search for detectors that hold on what others wrote (research/notes/transfer.md)."""
