"""The benchmark of the failure search: speed, where it looks, how true it is, memory."""
