"""The TVM runtime: mask-specialised machine code for sparse layers on this machine's CPU."""

from __future__ import annotations

from sift_compiler.errors import UnsupportedError
from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.options import Tune
from sift_compiler.runtimes.tvm.live_kernel import TvmKernel
from sift_compiler.runtimes.tvm.pool_kernel import MaxPool
from sift_compiler.runtimes.tvm.target import ensure_pool, host_cpu
from sift_compiler.runtimes.tvm.tune import Tuner


class TvmRuntime:
    """Builds live kernels out of TIR; see runtimes.base.Runtime."""

    name = "tvm"

    @property
    def image_lanes(self) -> int:
        """float32 numbers in a vector of this machine."""
        return host_cpu().lanes

    def pool(self, threads: int) -> MaxPool:
        """Max pooling by code of this machine."""
        if threads > 1:
            ensure_pool(threads)
        return MaxPool(host_cpu(), max(1, threads))

    def refuse(self, spec: LayerSpec, device: str) -> str | None:
        """Why a layer is not taken, or None: kernels are for float32 on the CPU."""
        if device.split(":")[0] != "cpu":
            return f"the tvm runtime computes on the CPU, the layer is on {device}"
        if spec.dtype != "float32":
            return f"the tvm runtime computes in float32, the layer holds {spec.dtype}"
        if spec.nnz >= 2**31:
            return "more than 2^31 kept weights"
        return None

    def build(
        self,
        spec: LayerSpec,
        name: str,
        threads: int,
        epilogue: Epilogue = PLAIN,
        tune: Tune = "off",
        freeze: bool = False,
        winograd: int = 0,
    ) -> TvmKernel:
        """A live kernel; machine code is made when the first input shows its shape, and tiles are measured then, if at all.

        Raises:
            UnsupportedError: :meth:`refuse` has a reason.
        """
        reason = self.refuse(spec, "cpu")
        if reason is not None:
            raise UnsupportedError(f"{name}: {reason}. Use runtime='eager'.")
        if threads > 1:
            ensure_pool(threads)
        return TvmKernel(
            spec,
            name,
            max(1, threads),
            host_cpu(),
            epilogue=epilogue,
            tuner=Tuner(tune),
            freeze=freeze,
            winograd=winograd,
        )
