"""Bases of hack directions: from the gradients of pairs to axes per module, and their files."""
