"""Who is on which host, and how another host reaches this one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915


def identity() -> str:
    """Equal for two ranks if they can reach each other over an abstract unix socket.

    That takes one kernel (boot id) and one network namespace. The host name is added because virtual machines cloned
    from one snapshot share both of the former. Equal identities are a reason to try; only the passed descriptor is the
    proof.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        namespace = os.stat("/proc/self/ns/net").st_ino
    except OSError:
        boot, namespace = "unknown", 0
    return f"{socket.gethostname()}/{boot}/{namespace}"


def name_of(identity_: str) -> str:
    """The part of an identity that a person wants to read."""
    return identity_.split("/", 1)[0]


def addresses() -> list[str]:
    """Addresses under which another host may reach this one, likeliest first; MNNVL_AR_HOST_ADDRESS overrides them."""
    forced = os.environ.get("MNNVL_AR_HOST_ADDRESS")
    if forced:
        return [forced]
    found: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:  # the address of the default route; a UDP connect sends nothing
            probe.connect(("192.0.2.1", 9))
            found.append(probe.getsockname()[0])
        except OSError:
            pass
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found.append(socket.inet_ntoa(reply[20:24]))
    with contextlib.suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    reachable = [address for address in dict.fromkeys(found) if not address.startswith("127.") and address != "::1"]
    return reachable or ["127.0.0.1"]
