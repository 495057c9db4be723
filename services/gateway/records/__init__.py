"""Records of the gateway: storage, idempotency, paging, read masks and events."""
