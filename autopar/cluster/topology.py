"""The links as a graph: devices, the switches that join them, and what a path between two devices can carry."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from autopar.cluster.cluster import Cluster
from autopar.cluster.link import Link

if TYPE_CHECKING:
    import networkx

Node = tuple[str, int]


def topology(cluster: Cluster) -> networkx.Graph:
    """A networkx graph: ``("device", i)`` hang on switches ``(span, k)``, level by level, up to the cluster's.

    Every edge carries ``bandwidth`` (B/s per device and direction) and ``latency`` (half a hop's: up, then down).
    """
    import networkx

    graph = networkx.Graph(name=cluster.name)
    graph.add_nodes_from((("device", i), {"device": cluster.device_at(i)}) for i in range(cluster.devices))
    start = 0
    for g, group in enumerate(cluster.groups):
        for i, place in enumerate(group.places, start):
            _hang(graph, i, place, group.links, f"{g}:" if len(cluster.groups) > 1 else "")
        start += group.devices
    if len(cluster.groups) > 1:
        _join(graph, cluster.links[-1])
    return graph


def _hang(graph: networkx.Graph, device: int, place: int, links: tuple[Link, ...], prefix: str) -> None:
    """Connect a device, by its place in its group, to the switch of every level above it."""
    below: Node = ("device", device)
    for link in links:
        above: Node = (f"{prefix}{link.span}", place // link.devices)
        graph.add_edge(below, above, bandwidth=link.bandwidth, latency=link.latency / 2)
        below = above


def _join(graph: networkx.Graph, link: Link) -> None:
    """Connect the topmost switches of unlike groups."""
    import networkx

    tops = [max(part, key=lambda node: graph.degree(node)) for part in list(networkx.connected_components(graph))]
    for top in tops:
        graph.add_edge(top, ("cluster", 0), bandwidth=link.bandwidth, latency=link.latency / 2)


def path(graph: networkx.Graph, a: int, b: int) -> tuple[float, float]:
    """What the way from device a to device b carries: the smallest bandwidth (B/s), the sum of latencies (s)."""
    import networkx

    way = networkx.shortest_path(graph, ("device", a), ("device", b))
    edges = [graph.edges[pair] for pair in pairwise(way)]
    return min(e["bandwidth"] for e in edges), sum(e["latency"] for e in edges)
