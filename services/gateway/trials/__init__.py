"""Trials of candidates on live requests."""
