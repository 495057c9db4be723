"""The version of client and services."""

VERSION = "0.1.0"
