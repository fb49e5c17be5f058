"""Symmetric memory: one block on every rank of a group, each mapped into all ranks, made by a voted bring-up.

`allocate(group, Request(...))` is the way in. Each room uses only rooms below it:

    symmetric                          the way in, and what comes of it
    agreement                          one vote on its own
    bringup, multicast                 the order of steps, the ways tried, and how all ranks fall back together
    parting                            when memory that is bound to a multicast may go
    block                              a block, its views, and the proof that all see one memory
    lifeline                           what stays open: who is gone is known at once
    rendezvous, place, group           how ranks find each other and connect
    hosts, process, descriptors        what a rank knows of its machine and its process
    processors                         how many SMs calls may count on
    vote, failures, connection         a step is done here and voted on everywhere; what a failure says
    request                            what a rank asks for, and what must be alike
    verbs, cuda_driver, host_driver    the few verbs that bring-up needs from a GPU or the host
"""

from .agreement import agree
from .group import AnyGroup, Group, Members
from .lifeline import ASLEEP, CHECKPOINT, CLOSED
from .request import Fill, Request
from .symmetric import SymmetricMemory, allocate
from .verbs import MULTICAST_SWITCHES, DriverError, MulticastRefused, forbid_multicast, multicast_refusal

__all__ = [
    "ASLEEP",
    "CHECKPOINT",
    "CLOSED",
    "MULTICAST_SWITCHES",
    "AnyGroup",
    "DriverError",
    "Fill",
    "Group",
    "Members",
    "MulticastRefused",
    "Request",
    "SymmetricMemory",
    "agree",
    "allocate",
    "forbid_multicast",
    "multicast_refusal",
]
