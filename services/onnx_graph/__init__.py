"""ONNX graphs, which are run in torch, trained and written back."""
