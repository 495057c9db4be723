"""Every call of the API, described once for `Client` and `aio.Client`: see `defuse.steps`."""
