"""Kernels of several functions: a module of one TIR function that is called from outside and others that it calls as plain C ones.

TVM gives every function of a module the calling convention of its runtime, unless it has no symbol; one without a symbol is nobody's to
call and is dropped. So the symbols of subroutines are added once calling conventions are settled.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

SUBROUTINE = "sift.subroutine"
"""Attribute of a TIR function that has no symbol yet: the symbol others call it by, through ``T.call_extern``."""


@functools.cache
def pipeline() -> str:
    """The name of TVM's usual pipeline for TIR, with subroutines; registered on first use."""
    import tvm

    tvm.tirx.register_tir_pipeline("sift", _with_subroutines)
    return "sift"


def _with_subroutines() -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    import tvm

    usual, finish_host, finish_device = tvm.tirx.get_tir_pipeline("default")

    @tvm.transform.module_pass(opt_level=0, name="sift.NameSubroutines")
    def name_subroutines(module: Any, _: Any) -> Any:
        named = {
            variable: function.with_attr("global_symbol", function.attrs[SUBROUTINE])
            for variable, function in module.functions.items()
            if SUBROUTINE in (function.attrs or {})
        }
        for variable, function in named.items():
            module.update_func(variable, function.without_attr("tirx.is_entry_func"))
        return module

    return tvm.transform.Sequential([usual, name_subroutines]), finish_host, finish_device
