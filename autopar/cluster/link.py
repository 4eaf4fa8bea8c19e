"""One level of the links between devices."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.spec.cluster import LinkSpec


@dataclass(frozen=True)
class Link:
    """Joins aligned runs of ``devices`` devices: ``bandwidth`` in B/s per device and direction, ``latency`` in seconds.

    ``efficiency``: the share of the bandwidth that large collectives reach.
    """

    span: str
    devices: int
    bandwidth: float
    latency: float
    efficiency: float = 1.0

    @staticmethod
    def of(spec: LinkSpec, per_host: int, hosts: int) -> Link:
        span = str(spec.span)
        devices = {"host": per_host, "cluster": per_host * hosts}.get(span) or int(spec.span)
        return Link(span, devices, spec.bandwidth, spec.latency, spec.efficiency)
