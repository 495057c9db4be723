"""`defuse audit`: who changed what."""

from typing import Annotated

import typer

from defuse.cli.output import JsonOption, print_json, print_table, record
from defuse.client import Client


def audit(
    limit: Annotated[int, typer.Option(min=1, help="How many of the latest to show.")] = 50, as_json: JsonOption = False
) -> None:
    """List what callers changed, or were to change. For admins."""
    with Client() as client:
        found = client.audit_events(limit)
    if as_json:
        print_json([record(one) for one in found])
        return
    rows = [
        (
            one.time.strftime("%Y-%m-%d %H:%M:%S UTC"),
            one.caller,
            one.role,
            one.method.rpartition("/")[2],
            ", ".join(one.resources),
            one.reason or one.code,
            one.peer,
        )
        for one in found
    ]
    columns = ("when", "who", "role", "call", "of", "outcome", "from")
    print_table(columns, rows, caption="newest first")
