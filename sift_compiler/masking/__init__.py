"""Sparse-training mathematics on tensors: when, how much, which, what follows."""
