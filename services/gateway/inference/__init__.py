"""Inference over the Open Inference Protocol, proxied without decoding tensors."""
