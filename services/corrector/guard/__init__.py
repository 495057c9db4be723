"""The guard: a release's regions as one ONNX model, that says of live images which known region they fall in."""
