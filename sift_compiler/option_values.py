"""The legal values of options, by name. Nothing else: sift --help and sift doctor tell them without torch."""

from __future__ import annotations

from typing import Literal

Initialisation = Literal["paper", "sparse_aware", "default"]
Decay = Literal["cosine", "linear", "exponential", "constant"]
Attention = Literal["heads_fixed", "head_dim_fixed"]
Groups = Literal["groups_fixed", "group_width_fixed"]
Depthwise = Literal["sparse", "dense"]
Distribution = Literal["uniform", "er", "erk"]
Sigma = Literal["bn_relu", "relu", "gelu", "identity"]
Rest = Literal["auto", "inductor", "eager"]
RESTS: tuple[Rest, ...] = ("auto", "inductor", "eager")
Tune = Literal["off", "quick", "full"]
TUNING: tuple[Tune, ...] = ("off", "quick", "full")
INITIALISATIONS: tuple[Initialisation, ...] = ("paper", "sparse_aware", "default")
DISTRIBUTIONS: tuple[Distribution, ...] = ("uniform", "er", "erk")
DECAYS: tuple[Decay, ...] = ("cosine", "linear", "exponential", "constant")
SIGMAS: tuple[Sigma, ...] = ("bn_relu", "relu", "gelu", "identity")
TRANSFORMATION_NAMES = ("wide", "parallel", "factorized", "doped", "low-rank")
"""The keys of options.TRANSFORMATIONS."""
