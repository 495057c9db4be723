"""Inference at the public door: the Open Inference Protocol, passed through to Triton without decoding a tensor."""
