"""What a program runs on: devices, hosts, the links between them, and how a mesh lies on them."""

from autopar.cluster.cluster import Cluster, Device, Group
from autopar.cluster.link import Link
from autopar.cluster.mesh import AXES, AxisLink

__all__ = ["AXES", "AxisLink", "Cluster", "Device", "Group", "Link"]
