"""The checkpoint whose law comes with assay, for tests that need a law and no model."""

QWEN3 = "4fe788470005f674c3b7a43790593d0a873a83b6fbabad16e403361d09a5b6fb"
"""Digest of ``reference:qwen3``."""
