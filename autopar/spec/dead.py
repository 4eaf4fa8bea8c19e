"""Devices that do not work: a cluster file's ``dead``, and which devices of which hosts that leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator

from autopar.spec.quantity import short

Devices = int | tuple[int, ...]
EXAMPLE = "{3: [5]} (device 5 of host 3), {3: 2} (two devices of host 3) or 1 (one device of the last host)"


def _number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read(value: object) -> object:
    """``value`` with whole numbers for hosts, which JSON and ``--set`` write as text."""
    if _number(value):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"must be such as {EXAMPLE}, not {short(value)}")
    found: dict[int, Devices] = {}
    for host, devices in value.items():
        if not _number(host) and not (isinstance(host, str) and host.isdecimal()):
            raise ValueError(f"has the host {short(host)}; hosts are numbered from 0, such as {EXAMPLE}")
        many = isinstance(devices, (list, tuple)) and all(_number(d) for d in devices)
        if not many and not _number(devices):
            raise ValueError(
                f"has {short(devices)} for host {host}; must be a list of devices or how many, such as {EXAMPLE}"
            )
        found[int(host)] = tuple(sorted(set(devices))) if isinstance(devices, (list, tuple)) else devices
    return found


Dead = Annotated[int | dict[int, Devices], BeforeValidator(_read)]
"""How many devices are dead, counted from the last host back; or for some hosts which devices, or how many of them."""


def dead_devices(dead: int | Mapping[int, Devices], per_host: int, hosts: int) -> dict[int, tuple[int, ...]]:
    """The dead devices of every host that has some; of a host where only their number is told, its last ones.

    Raises ValueError where a host or device is not there, or none is left.
    """
    if isinstance(dead, int):
        dead = {hosts - 1 - i: n for i in range(hosts) if (n := min(per_host, dead - i * per_host)) > 0} if (
            dead < per_host * hosts
        ) else {h: per_host for h in range(hosts)}  # fmt: skip
    found = {}
    for host, devices in dead.items():
        if host >= hosts:
            raise ValueError(f"has dead devices on host {host}; hosts are numbered 0 to {hosts - 1}")
        listed = tuple(range(per_host - devices, per_host)) if isinstance(devices, int) else devices
        if isinstance(devices, int) and devices > per_host or any(d >= per_host for d in listed):
            raise ValueError(
                f"has dead devices on host {host} that are not there: {devices}; a host has {per_host}, numbered from 0"
            )
        if listed:
            found[host] = listed
    if sum(map(len, found.values())) >= per_host * hosts:
        raise ValueError(f"has no device left: all {per_host * hosts} are dead; leave it out")
    return dict(sorted(found.items()))
