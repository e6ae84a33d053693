"""Attackers as real programs, and what it costs to fool each rule."""
