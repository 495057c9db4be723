"""Records of the gateway: compare-and-set, idempotency, paging, read masks and events."""
