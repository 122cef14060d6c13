"""Real kernels through the disk cache: linked, without a linker, damaged, and every input of the key."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sift_compiler.runtimes.cache import KernelCache, contents
from sift_compiler.runtimes.tvm import build, kernels
from sift_compiler.runtimes.tvm.target import host_cpu


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SIFT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_compiled", {})


def new_process(monkeypatch):
    """Forget what is in memory; compiling anew becomes an error."""
    monkeypatch.setattr(build, "_compiled", {})
    monkeypatch.setattr(build, "compile_anew", lambda *_, **__: pytest.fail("compiled although it is on disk"))


def gathers(kernel) -> bool:
    values, packed = torch.randn(100), torch.zeros(100)
    kernel(values, torch.arange(100).flip(0).int(), packed, 1, 100)
    return torch.equal(packed, values.flip(0))


@pytest.mark.parametrize("linker", [True, False])
def test_a_kernel_is_found_on_disk_by_the_next_process(monkeypatch, tmp_path, linker):
    if not linker:
        monkeypatch.setattr("tvm.support.cc.get_cc", lambda: None)
    cpu = host_cpu().name
    assert gathers(build.compiled(kernels.gather, cpu, parallel=False))
    assert {file.suffix for file in tmp_path.iterdir()} - {".lock"} == {".json", ".so" if linker else ".ll"}
    new_process(monkeypatch)
    assert gathers(build.compiled(kernels.gather, cpu, parallel=False))


def test_a_truncated_library_is_compiled_anew(monkeypatch, tmp_path):
    cpu = host_cpu().name
    build.compiled(kernels.gather, cpu, parallel=False)
    (library,) = tmp_path.glob("*.so")
    begin = library.read_bytes()[:1000]
    library.unlink()  # this process still has the whole one in its memory
    library.write_bytes(begin)
    monkeypatch.setattr(build, "_compiled", {})
    assert gathers(build.compiled(kernels.gather, cpu, parallel=False))
    assert library.stat().st_size > 1000
    new_process(monkeypatch)
    assert gathers(build.compiled(kernels.gather, cpu, parallel=False))


def test_every_input_of_the_key_counts(monkeypatch):
    cpu = host_cpu().name
    key = build.fingerprint(kernels.gather, cpu, {"parallel": False})
    assert key == build.fingerprint(kernels.gather, cpu, {"parallel": False})
    others = [
        build.fingerprint(kernels.gather, cpu, {"parallel": True}),
        build.fingerprint(kernels.pack_space, cpu, {"parallel": False}),
        build.fingerprint(kernels.gather, "x86-64" if cpu != "x86-64" else "znver4", {"parallel": False}),
    ]
    monkeypatch.setattr(build, "_toolchain", lambda: (("apache-tvm", "0.0"),))
    others.append(build.fingerprint(kernels.gather, cpu, {"parallel": False}))
    monkeypatch.setattr(build, "source_digest", lambda *_: "edited")
    others.append(build.fingerprint(kernels.gather, cpu, {"parallel": False}))
    assert len({each.digest for each in [key, *others]}) == 6
    assert {field.name for field in dataclasses.fields(key)} == {
        "generator", "constants", "target", "features", "toolchain", "source",
    }  # fmt: skip


def test_without_readable_sources_nothing_is_stored(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "source_digest", lambda *_: None)
    assert gathers(build.compiled(kernels.gather, host_cpu().name, parallel=False))
    assert contents(tmp_path).kernels == 0


def test_code_from_disk_is_never_shared_between_keys(tmp_path):
    cpu = host_cpu().name
    key = build.fingerprint(kernels.gather, cpu, {"parallel": False})
    build.compiled(kernels.gather, cpu, parallel=False)
    assert KernelCache(tmp_path, build._FORMS).try_load(dataclasses.replace(key, target="llvm other")) is None
