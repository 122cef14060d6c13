"""Masks that move: when they do, how many weights, which ones, and what follows. Tensors and optimizers only."""
