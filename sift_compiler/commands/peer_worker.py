"""One engine of ``sift bench`` in a process of its own, run by whatever Python has the engine; it imports nothing of this package.

Usage: peer_worker.py ENGINE MODEL.onnx INPUTS.npz THREADS OUTPUT.npy. Says when it is ready, runs once for every line on standard input and
answers with its milliseconds of wall and of processor time; one JSON object per line. The first output is written to OUTPUT.npy.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def onnxruntime(path: str, inputs: list[Any], threads: int) -> Callable[[], Any]:
    """ONNX Runtime on the CPU."""
    engine: Any = importlib.import_module("onnxruntime")
    options = engine.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = engine.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {each.name: array for each, array in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, feed)[0]


def openvino(path: str, inputs: list[Any], threads: int) -> Callable[[], Any]:
    """OpenVINO on the CPU, for latency, in float32."""
    engine: Any = importlib.import_module("openvino")
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = engine.Core().compile_model(path, "CPU", hints).create_infer_request()
    return lambda: request.infer(inputs)[0]


def deepsparse(path: str, inputs: list[Any], threads: int) -> Callable[[], Any]:
    """DeepSparse, which is closed and out of support: to measure against only."""
    os.environ["NM_DISABLE_ANALYTICS"] = "True"
    engine: Any = importlib.import_module("deepsparse")
    model = engine.compile_model(path, batch_size=inputs[0].shape[0], num_cores=threads)
    return lambda: model.run(inputs)[0]


ENGINES = {"onnxruntime": onnxruntime, "openvino": openvino, "deepsparse": deepsparse}


def main() -> None:
    """Serve; see the module's text."""
    engine, path, given, threads, output = sys.argv[1:6]
    # Engines print what they like; answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        numpy: Any = importlib.import_module("numpy")
        with numpy.load(given) as arrays:
            inputs = [arrays[name] for name in sorted(arrays)]
        run = ENGINES[engine](path, inputs, int(threads))
        numpy.save(output, numpy.asarray(run()))
        version = importlib.import_module("importlib.metadata").version(engine)
    except Exception as error:  # an engine may raise anything; the caller tells the user
        answer(failed=f"{type(error).__name__}: {error}")
        return
    answer(ready=version)
    for _ in sys.stdin:
        begin, spent = time.perf_counter(), time.process_time()
        run()
        answer(wall=1e3 * (time.perf_counter() - begin), processor=1e3 * (time.process_time() - spent))


if __name__ == "__main__":
    main()
