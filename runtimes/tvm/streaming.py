"""Stores past the caches, for outputs that no cache holds.

An ordinary store reads the line it writes to: of an output of 40 MB that is 40 MB from memory for nothing, and as much of the input and
of the weights loses its place in the second-level cache. TVM has no word for such stores, so the two functions are LLVM's text.
"""

from __future__ import annotations

STREAM, STREAMED = "sift_stream", "sift_streamed"
"""``STREAM(address, vector)`` stores a vector; ``STREAMED()`` has all of them done before anything that follows."""

STREAMED_BYTES = 8 * 2**20
"""Smallest output worth it."""


_LLVM = {"float32": ("float", 4), "float64": ("double", 8)}
"""What LLVM calls a type, and its bytes."""


def streaming(lanes: int, dtype: str = "float32") -> str:
    """The functions for vectors of ``lanes`` numbers, which begin at multiples of their size; import it with ``pragma_import_llvm``."""
    kind, size = _LLVM[dtype]
    return f"""
define void @{STREAM}(ptr %address, <{lanes} x {kind}> %vector) alwaysinline {{
  store <{lanes} x {kind}> %vector, ptr %address, align {size * lanes}, !nontemporal !0
  ret void
}}
define void @{STREAMED}() alwaysinline {{
  fence seq_cst
  ret void
}}
!0 = !{{i32 1}}
"""
