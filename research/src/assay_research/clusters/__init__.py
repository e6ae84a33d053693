"""Every rule side by side on nonces that real clusters published: honest machines left out, and
cheats.
"""
