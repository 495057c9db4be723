"""Inference by the Open Inference Protocol, proxied to Triton without decoding tensors."""
