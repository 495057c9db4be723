"""ONNX graphs: read, run as a torch module, trained and written back."""
