"""The contract of an API server, on the real one: see tests/contracts/cluster_contract.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.kube.client import Json
from tests.cluster.control_plane import ControlPlane
from tests.cluster.identity import AgentOnNode
from tests.cluster.kserve_crds import kserve_crds
from tests.cluster.nodes import Node
from tests.cluster.proxy import Proxy
from tests.contracts.cluster_contract import ClusterContract, OtherWorld, World, hurry

__all__ = ["hurry"]


class RealWorld(World):
    """What changes here is changed by the admin; what is asked, by the agent of this node."""

    def __init__(self, plane: ControlPlane, node: str, kubeconfig: Path) -> None:
        self.plane = plane
        self.node = node
        self.kubeconfig = kubeconfig
        self.proxy: Proxy | None = None
        self.identity: AgentOnNode | None = None

    async def get(self, path: str) -> Json:
        return await self._ask("GET", path)

    async def put(self, path: str, body: Mapping[str, Any]) -> Json:
        while True:
            found = await asyncio.to_thread(self.plane.request, "GET", path)
            if found.status == 404:
                return await self._ask("POST", path.rpartition("/")[0], body)
            version = found.ok()["metadata"]["resourceVersion"]
            metadata = {**body["metadata"], "resourceVersion": version}
            put = {**body, "metadata": metadata}
            answer = await asyncio.to_thread(self.plane.request, "PUT", path, put)
            if answer.status != 409:  # whoever is tested may have written between the two
                result: Json = answer.ok()
                return result

    async def patch(self, path: str, body: Json) -> Json:
        return await self._ask("PATCH", path, body)

    async def delete(self, path: str) -> None:
        await self._ask("DELETE", path, {"gracePeriodSeconds": 0})

    def revoke(self) -> None:
        assert self.proxy is not None
        assert self.identity is not None
        self.proxy.revoked.add(self.identity.token)

    def rotate(self) -> None:
        assert self.identity is not None
        self.identity.rotate()

    async def _ask(self, method: str, path: str, body: Any = None) -> Json:
        answer = await asyncio.to_thread(self.plane.request, method, path, body)
        found: Json = answer.ok()
        return found


class OtherRealWorld(RealWorld, OtherWorld):
    async def forget(self) -> None:
        await asyncio.to_thread(self.plane.compact)

    def revoke(self) -> None:
        raise NotImplementedError

    def rotate(self) -> None:
        raise NotImplementedError


@pytest.fixture(scope="module")
def other_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """With KServe's own CRDs and nothing else, and no memory of its own beside etcd's."""
    directory = tmp_path_factory.mktemp("other-control-plane")
    with ControlPlane(directory, flags=["--watch-cache=false"]) as plane:
        plane.apply(*kserve_crds())
        plane.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
        yield plane


class TestRealCluster(ClusterContract):
    @pytest.fixture
    def world(self, node: Node) -> Iterator[World]:
        account = {"metadata": {"name": "default"}}  # kube-controller-manager's work
        node.plane.request("POST", "/api/v1/namespaces/default/serviceaccounts", account)
        with node.behind_a_proxy() as proxy:
            world = RealWorld(node.plane, node.name, Path(node.environment["KUBECONFIG"]))
            world.proxy, world.identity = proxy, node.identity
            yield world

    @pytest.fixture
    def other_world(self, other_plane: ControlPlane, node_name: str) -> OtherWorld:
        return OtherRealWorld(other_plane, node_name, other_plane.kubeconfig())
