"""Research: the published tables measured again, attackers, a simulated network, and training
studies.
"""
