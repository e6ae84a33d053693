"""Attackers as real programs against the published rules, the sequential test, and the hardened
preset.
"""
