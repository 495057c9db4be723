"""The audit log of calls that change something."""
