"""The version of the system, in the one place that both sides of the wire read."""

VERSION = "0.1.0"
