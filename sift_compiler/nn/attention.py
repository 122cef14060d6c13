"""Scaled dot-product attention whose dropout follows train and eval mode."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ScaledDotProductAttention(nn.Module):
    """``torch.nn.functional.scaled_dot_product_attention`` with dropout in train mode only.

    A captured graph holds the probability as a number, which eval mode could not switch off; this module can.

    Args:
        dropout_p: probability with which an attention weight is dropped in train mode, in [0, 1].
        is_causal: whether a position attends to itself and earlier ones only.
        scale: factor on the scores; None means 1 / sqrt(width of a head).
        enable_gqa: whether key and value have fewer heads than query.
    """

    def __init__(self, dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool) -> None:
        super().__init__()
        self.dropout_p, self.is_causal, self.scale, self.enable_gqa = dropout_p, is_causal, scale, enable_gqa

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """query [..., t, e], key [..., s, e], value [..., s, v] → [..., t, v]."""
        return F.scaled_dot_product_attention(
            query, key, value, mask, self.dropout_p if self.training else 0.0, self.is_causal,
            scale=self.scale, enable_gqa=self.enable_gqa,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Settings."""
        return f"dropout_p={self.dropout_p}, is_causal={self.is_causal}"
