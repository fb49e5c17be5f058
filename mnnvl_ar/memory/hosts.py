"""Who is on which host, and how another host reaches this one."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
ADDRESS_VARIABLE = "MNNVL_AR_HOST_ADDRESS"
# Of each family, an address of the documentation's: a UDP connect sends nothing, and shows the default route's own.
_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


_BOOT = _boot()  # now: later this process may have no descriptor left to read it with


def identity() -> str:
    """host name / kernel (boot id) / network namespace. Equal for two ranks of one host that have one name for it."""
    try:
        namespace = os.stat("/proc/self/ns/net").st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()}/{_BOOT}/{namespace}"


def may_share_sockets(one: str, other: str) -> bool:
    """Whether it is worth a try that two ranks reach each other over an abstract unix socket. That takes one kernel and
    one network namespace, whatever names they have for their host (containers have their own). It is no proof: virtual
    machines cloned from one snapshot share both."""
    return kernel_of(one) == kernel_of(other)


def kernel_of(identity_: str) -> str:
    """The part of an identity by which sockets go: not the name."""
    return identity_.partition("/")[2] or identity_


def name_of(identity_: str) -> str:
    """The part of an identity that a person wants to read."""
    return identity_.split("/", 1)[0]


def addresses() -> list[str]:
    """Addresses under which another host may reach this one, likeliest first; MNNVL_AR_HOST_ADDRESS overrides them.

    Those of the default routes, then of every interface, IPv6 or IPv4. Not link-local ones, which mean something on one
    link only.
    """
    forced = os.environ.get(ADDRESS_VARIABLE)
    if forced:
        return [forced]
    found = [address for family in _ELSEWHERE for address in _of_default_route(family)]
    found += _of_interfaces()
    if not any(map(_is_of_use, found)):  # or not at all: the resolver may take as long as it likes
        found += _of_name()
    return [address for address in dict.fromkeys(found) if _is_of_use(address)] or ["127.0.0.1"]


def _of_name() -> list[str]:
    with contextlib.suppress(OSError, UnicodeError, LookupError):  # a name of 64 characters is no name to the resolver
        told = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        return [str(info[4][0]) for info in told]
    return []


def _is_of_use(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # with a zone: link-local
        return False
    return not (parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified)


def _of_default_route(family: socket.AddressFamily) -> list[str]:
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((_ELSEWHERE[family], 9))
        return [str(probe.getsockname()[0])]
    return []


def _of_interfaces() -> list[str]:
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # this interface has no IPv4 address
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(reply[20:24]))
    with contextlib.suppress(OSError):  # no IPv6
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line.split()[0])))
    return found
