"""The ONNX runtime: export. onnx and onnxruntime are imported only here, and only when used."""
