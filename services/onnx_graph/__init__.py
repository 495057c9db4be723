"""ONNX graphs that are read, run as a torch module, trained and written back."""
