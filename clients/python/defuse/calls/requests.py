"""Ids of requests, which make it safe to send one again."""

import uuid


def new_id() -> str:
    """Return an id that no other request has."""
    return str(uuid.uuid4())
