"""Stores past the caches, for outputs that no cache holds.

An ordinary store reads the line it writes to: of an output of 40 MB that is 40 MB from memory for nothing, and as much of the input and
of the weights loses its place in the second-level cache. TVM has no word for such stores, so the two functions are LLVM's text.
"""

from __future__ import annotations

STREAM, STREAMED = "sift_stream", "sift_streamed"
"""``STREAM(address, vector)`` stores a vector; ``STREAMED()`` has all of them done before anything that follows."""

STREAMED_BYTES = 8 * 2**20
"""Smallest output worth it."""


def streaming(lanes: int) -> str:
    """The functions for vectors of ``lanes`` float32, which begin at multiples of their size; import it with ``pragma_import_llvm``."""
    return f"""
define void @{STREAM}(ptr %address, <{lanes} x float> %vector) alwaysinline {{
  store <{lanes} x float> %vector, ptr %address, align {4 * lanes}, !nontemporal !0
  ret void
}}
define void @{STREAMED}() alwaysinline {{
  fence seq_cst
  ret void
}}
!0 = !{{i32 1}}
"""
