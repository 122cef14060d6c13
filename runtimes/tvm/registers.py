"""Local buffers that become registers.

TVM takes every local buffer of a CPU function from its heap, and LLVM moves numbers between heap and registers wherever it cannot prove
that nobody else looks: around the loop of every bucket. A buffer that keeps the annotation below stays a variable on the stack,
and LLVM turns it into registers. TVM's storage rewriting drops annotations, so a function that is marked is compiled without it
(see build.compile_anew); then every local buffer of the function must come from here.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

IN_REGISTERS = "sift.registers"
"""The attribute of a TIR function whose local buffers all come from :func:`registers`."""


def registers(count: int, dtype: str = "float32") -> Any:
    """A local buffer of ``count`` numbers inside a TIR function; constant indices only, or it will lie in memory."""
    return T.alloc_buffer((count,), dtype, scope="local", annotations={"disable_lower_builtin": True})
