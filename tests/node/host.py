"""What a node needs of the host that runs it, and how all of that is removed again.

The network of the host is the node's: a bridge carries the node's address and the API server's.
Nothing is forwarded, so pods reach this host and nothing else.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from tests.machine import until
from tests.node.packages import make_mount_points, remove_mount_points, run

NAME = "lmnode"
BRIDGE = "lmbr0"
ADDRESS = "10.88.77.1"
API_ADDRESS = "10.96.0.1"
"""The first of the services: the address that pods have for `kubernetes`, without a kube-proxy."""

MOUNT_POINTS = (
    "/run/containerd",  # the first of these are compiled into containerd and kubelet
    "/run/netns",
    "/var/lib/cni",
    "/var/lib/kubelet",
    "/var/log/containers",
    "/models",  # and these two are the agent's
    "/var/lib/localmodel-agent",
)
"""Empty directories on the host, filled in the namespace."""

_CGROUPS = Path("/sys/fs/cgroup")


def set_up() -> None:
    # Its own address: else it takes the lowest of its ports', a new one with some pods that come or
    # go, and those that are there answer to the old one until they ask again: half a minute.
    run("ip", "link", "add", BRIDGE, "address", "02:00:0a:58:4d:01", "type", "bridge")
    for address in (f"{ADDRESS}/24", f"{API_ADDRESS}/32"):
        run("ip", "address", "add", address, "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    for tree in _cgroup_trees():
        cgroup = tree / NAME  # the one parent of all pods' groups
        cgroup.mkdir()
        # Of v1: empty in a new group, and a group without a processor runs nothing.
        for name in ("cpuset.cpus", "cpuset.mems"):
            if not one_cgroup_tree() and (cgroup / name).exists():
                (cgroup / name).write_text((tree / name).read_text())
    make_mount_points(*MOUNT_POINTS)


def clean_up() -> None:
    """Remove all that a node leaves here. Its processes have ended, or are just ending."""
    if Path("/sys/class/net", BRIDGE).exists():
        for link in json.loads(run("ip", "-json", "link", "show", "master", BRIDGE) or "[]"):
            with suppress(RuntimeError):  # it goes with its pod's network, perhaps just now
                run("ip", "link", "delete", link["ifname"])
        run("ip", "link", "delete", BRIDGE)
    until(_cgroups_are_gone, "processes of the node live on", seconds=120)
    remove_mount_points(*MOUNT_POINTS)


def one_cgroup_tree() -> bool:
    """Whether this is cgroup v2. v1 has a tree for each controller."""
    return (_CGROUPS / "cgroup.controllers").exists()


def _cgroup_trees() -> list[Path]:
    if one_cgroup_tree():
        return [_CGROUPS]
    return [path for path in _CGROUPS.iterdir() if path.is_dir() and not path.is_symlink()]


def _cgroups_are_gone() -> bool:
    cgroups = [tree / NAME for tree in _cgroup_trees()]
    for cgroup in cgroups:
        for directory, _, _ in os.walk(cgroup, topdown=False):
            with suppress(OSError):  # a process in it is not reaped yet
                Path(directory).rmdir()
    return not any(cgroup.exists() for cgroup in cgroups)
