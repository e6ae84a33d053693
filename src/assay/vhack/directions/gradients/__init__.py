"""Gradients of single samples with respect to δS, of every weight matrix at once."""
