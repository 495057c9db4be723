"""Addresses that nobody on another host can reach, and whose traffic nobody there can read."""

import ipaddress


def is_loopback(address: str) -> bool:
    """Say whether HOST:PORT, or a HOST alone, is this host by its own name for itself; a name is not looked up."""
    if address.startswith("unix:"):
        return True
    host = host_of(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(address: str) -> str:
    """Return the host of HOST:PORT, also where it is an IPv6 address, in brackets or alone."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]
