"""From an ONNX graph to what an engine opens. Needs no torch, so that it also runs on a device."""
