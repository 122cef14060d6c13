"""Sparse layers and the operators they call."""

from sift_compiler.nn import operators as operators
from sift_compiler.nn.conv import SparseConv2d
from sift_compiler.nn.layer import SparseLayer
from sift_compiler.nn.linear import SparseLinear
from sift_compiler.nn.mask_hook import MaskHook

__all__ = ["MaskHook", "SparseConv2d", "SparseLayer", "SparseLinear"]
