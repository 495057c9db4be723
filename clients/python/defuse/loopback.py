"""Loopback addresses, which other hosts cannot reach."""

import ipaddress


def is_loopback(address: str) -> bool:
    """Return whether HOST or HOST:PORT is a loopback address.

    Unix sockets count as such. Names are not resolved, and only localhost counts.
    """
    if address.startswith("unix:"):
        return True
    host = host_of(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(address: str) -> str:
    """Return the host of HOST or HOST:PORT, also for IPv6 addresses."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]
