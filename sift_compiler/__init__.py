"""Rewrite dense PyTorch models into iso-FLOP sparse ones, train them with moving masks, run them as mask-specialised code."""
