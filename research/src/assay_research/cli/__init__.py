"""Commands of research, which ``assay`` finds by the entry points of this package
(research/pyproject.toml).
"""
