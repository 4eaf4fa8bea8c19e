"""Where a pipeline stands on a cluster of unlike hosts: which devices each of its ranks has, and what they are like.

Consecutive ranks on hosts that count as alike are a `Share`; a `Layout` is all shares, in the order of the pipeline. Ranks
take whole groups of ``wide`` = dp · tp devices, so that all collectives but the pipeline's own messages stay within a share. A
share of several groups (one that replicas run across) counts every device as the weakest of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, permutations, product

from autopar.cluster.cluster import Cluster, Group, slowest, weakest
from autopar.cluster.link import Link

MANY_GROUPS = 4  # up to so many groups every set of them may count as alike; of more, one alone or all
COUNTS = 8  # numbers of ranks on a share that are tried, where there are two; of more shares, a third of it


@dataclass(frozen=True)
class Used:
    """The devices of one host that a plan uses; ``host`` counts from 0 within its group."""

    group: int
    host: int
    devices: int


@dataclass(frozen=True, eq=False)
class Share:
    """``ranks`` consecutive pipeline ranks on ``hosts`` of some groups; ``cluster`` is what those ranks see of it all."""

    cluster: Cluster
    groups: tuple[int, ...]
    ranks: int
    hosts: tuple[Used, ...]

    @property
    def devices(self) -> int:
        return sum(used.devices for used in self.hosts)


@dataclass(frozen=True, eq=False)
class Layout:
    """The shares of a pipeline in the order of its ranks."""

    whole: Cluster
    shares: tuple[Share, ...]

    @cached_property
    def of(self) -> tuple[int, ...]:
        """The share of every pipeline rank."""
        return tuple(i for i, share in enumerate(self.shares) for _ in range(share.ranks))

    @property
    def devices(self) -> int:
        return sum(share.devices for share in self.shares)

    def between(self, a: int, b: int) -> Link:
        """The link from one share to another: where several groups meet, the slowest that joins them."""
        pairs = product(self.shares[a].groups, self.shares[b].groups)
        found = slowest([joining(self.whole, i, j) for i, j in pairs], self.whole.devices, "cluster")
        assert found is not None
        return found

    def unused(self) -> dict[int, int]:
        """How many working devices of every group are not used, where there are some."""
        left = {g: group.devices for g, group in enumerate(self.whole.groups)}
        for share in self.shares:
            for used in share.hosts:
                left[used.group] -= used.devices
        return {g: count for g, count in left.items() if count}


# ------------------------------------------------------------------ links


def joining(cluster: Cluster, a: int, b: int) -> Link:
    """What a message from one group to another crosses: the innermost of the cluster's links that joins both groups, and
    the links by which they leave their hosts."""
    starts, total = [], 0
    for group in cluster.groups:
        starts.append(total)
        total += group.devices_per_host * group.hosts
    low, high = min(a, b), max(a, b)
    last = starts[high] + cluster.groups[high].devices_per_host * cluster.groups[high].hosts - 1
    levels = [k for k in cluster.links if k.span != "host"] or list(cluster.links)
    met = next((k for k in levels if starts[low] // k.devices == last // k.devices), levels[-1])
    own = [exit_of(cluster.groups[g]) for g in (a, b)]
    return replace(met, bandwidth=min([met.bandwidth, *(k.bandwidth for k in own if k is not None)]))


def exit_of(group: Group) -> Link | None:
    """The link by which a device of a group leaves its host; None where the group has none of its own."""
    return next((k for k in group.links if k.span == "cluster" or k.devices > group.devices_per_host), None)


def levels_of(cluster: Cluster, group: Group, used: tuple[Used, ...]) -> tuple[Link, ...]:
    """The links among used devices of one group, which number fewer than its devices.

    Levels within a host hold where whole hosts are used, levels of several hosts where those used stand together.
    """
    per, total, size = max(u.devices for u in used), sum(u.devices for u in used), group.devices_per_host
    together = [u.host for u in used] == list(range(used[0].host, used[0].host + len(used)))
    found = []
    for link in group.links:
        hosts = link.devices // size
        if link.span == "cluster":
            found.append(replace(link, devices=total))
        elif link.devices == size:
            found.append(replace(link, devices=per))
        elif link.devices < size and per == size and not group.dead:
            found.append(link)
        elif link.devices > size and link.devices % size == 0 and together and used[0].host % hosts == 0:
            found.append(replace(link, devices=hosts * per))
    if total > per and (not found or found[-1].devices < total):  # levels that do not hold leave the outermost one
        outer = group.links[-1] if group.links else cluster.links[-1]
        found.append(replace(outer, span="cluster", devices=total))
    return tuple(found)


def seen(cluster: Cluster, members: tuple[int, ...], used: tuple[Used, ...]) -> Cluster:
    """Used devices as one cluster of one kind."""
    sizes = tuple(u.devices for u in used)
    groups = [cluster.groups[g] for g in members]
    name = " + ".join(g.name for g in groups)
    if len(members) == 1:
        links = levels_of(cluster, groups[0], used)
    else:
        inside = slowest([k for g in groups for k in g.links if k.devices == g.devices_per_host], max(sizes))
        outer = [k for g in groups if (k := exit_of(g)) is not None]
        outer += [joining(cluster, a, b) for a, b in combinations(members, 2)]
        far = slowest(outer, sum(sizes), "cluster")
        links = tuple(k for k in (inside if max(sizes) > 1 else None, far) if k is not None)
    one = Group(name, weakest([g.device for g in groups]), max(sizes), len(used), links)
    return Cluster(name, (one,), links, sizes if len(set(sizes)) > 1 else ())


# ------------------------------------------------------------------ which hosts


def take(cluster: Cluster, members: tuple[int, ...], ranks: int, tp: int, wide: int) -> Share | None:
    """Hosts of these groups for so many ranks; None where there are not enough devices. tp stays within a host.

    The same number of devices on each host, in step with the ranks, where that can be; else hosts are filled in order.
    """
    hosts = [Used(g, h, n) for g in members for h, n in enumerate(cluster.groups[g].live) if n]
    used = alike(hosts, ranks * wide, tp, wide) or filled(hosts, ranks * wide, tp, wide)
    if used is None:
        return None
    own = tuple(g for g in members if any(u.group == g for u in used))
    return Share(seen(cluster, own, used), own, ranks, used) if own == members else None


def alike(hosts: list[Used], total: int, tp: int, wide: int) -> tuple[Used, ...] | None:
    """As many devices as can be on each of as few hosts."""
    for each in range(min(max(u.devices for u in hosts), total), 0, -1):
        if each % tp or total % each or (each % wide and wide % each):
            continue
        fit = [u for u in hosts if u.devices >= each][: total // each]
        if len(fit) * each == total:
            return tuple(replace(u, devices=each) for u in fit)
    return None


def filled(hosts: list[Used], total: int, tp: int, wide: int) -> tuple[Used, ...] | None:
    """Hosts in order until there are enough devices: whole ranks on each where that is enough, else whole tp groups."""
    for step in (wide, tp):
        found, left = [], total
        for u in hosts:
            if (count := min(left, u.devices // step * step)) > 0:
                found.append(replace(u, devices=count))
                left -= count
        if not left:
            return tuple(found)
    return None


def room(cluster: Cluster, members: tuple[int, ...], tp: int, wide: int) -> int:
    """How many ranks these groups have devices for."""
    return sum(n // tp * tp for g in members for n in cluster.groups[g].live) // wide


# ------------------------------------------------------------------ all layouts


class Layouts:
    """The layouts of a cluster; shares that occur again are made once."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.made: dict[tuple, Share | None] = {}

    def share(self, members: tuple[int, ...], ranks: int, tp: int, wide: int) -> Share | None:
        key = (members, ranks, tp, wide)
        if key not in self.made:
            self.made[key] = take(self.cluster, *key)
        return self.made[key]

    def pools(self, tp: int, wide: int) -> dict[tuple[int, ...], range]:
        """Sets of groups that may count as alike, and how many ranks each may have: several groups only where none of
        them has room for so many ranks by itself."""
        every = range(len(self.cluster.groups))
        sizes = range(1, len(every) + 1) if len(every) <= MANY_GROUPS else (1, len(every))
        found = {}
        for members in (m for size in sizes for m in combinations(every, size)):
            alone = sum(room(self.cluster, (g,), tp, wide) for g in members) if len(members) > 1 else 0
            counts = range(alone + 1, room(self.cluster, members, tp, wide) + 1)
            if counts:
                found[members] = counts
        return found

    def all(self, tp: int, wide: int, most: int, pp: int | None = None) -> Iterator[Layout]:
        """Every choice of pools, in every order along the pipeline, of at most ``most`` ranks (just ``pp``)."""
        pools = self.pools(tp, wide)
        for size in range(1, len(self.cluster.groups) + 1):
            for chosen in combinations(pools, size):
                if len({g for members in chosen for g in members}) < sum(map(len, chosen)):
                    continue
                few = None if pp else COUNTS if size <= 2 else COUNTS // 3
                counts = [tried(pools[members], most, few) for members in chosen]
                for ranks in product(*counts):
                    if sum(ranks) <= most and pp in (None, sum(ranks)):
                        yield from self.orders(chosen, ranks, tp, wide)

    def orders(
        self, chosen: tuple[tuple[int, ...], ...], ranks: tuple[int, ...], tp: int, wide: int
    ) -> Iterator[Layout]:
        shares = [self.share(members, n, tp, wide) for members, n in zip(chosen, ranks, strict=True)]
        if any(share is None for share in shares):
            return
        for order in permutations([share for share in shares if share is not None]):
            yield Layout(self.cluster, order)


def tried(counts: range, most: int, few: int | None) -> list[int]:
    """The largest numbers of ranks up to ``most``, and of many the shares of it: not each of hundreds."""
    found = [n for n in counts if n <= most]
    if few is None or len(found) <= few:
        return found
    top = found[-1]
    spread = [top * i // few for i in range(few, 0, -1)]
    return sorted({n for n in [*found[-(few // 2) :], *spread] if n in counts}, reverse=True)
