"""The version, in one place that nothing has to be loaded for."""

__version__ = "0.3.0"
