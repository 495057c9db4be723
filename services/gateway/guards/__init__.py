"""Guards: their creation and listing."""
