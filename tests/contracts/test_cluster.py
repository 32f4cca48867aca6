"""The contract of an API server, on the fake one. On a real one: tests/cluster/test_contract.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.cluster_contract import ClusterContract, OtherWorld, World, hurry
from tests.fakes.cluster import FakeCluster, Json

__all__ = ["hurry"]


class FakeWorld(World):
    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.node = "node-1"
        self.kubeconfig = cluster.kubeconfig

    async def get(self, path: str) -> Json:
        return self.cluster.get(path)

    async def put(self, path: str, body: Mapping[str, Any]) -> Json:
        return await self.cluster.put(path, body)

    async def patch(self, path: str, body: Json) -> Json:
        return await self.cluster.patch(path, body)

    async def delete(self, path: str) -> None:
        await self.cluster.delete(path)

    def revoke(self) -> None:
        self.cluster.token = "second"

    def rotate(self) -> None:
        self.cluster.token_file.write_text(self.cluster.token)


class OtherFakeWorld(FakeWorld, OtherWorld):
    async def forget(self) -> None:
        await self.cluster.forget()


class TestFakeCluster(ClusterContract):
    @pytest.fixture
    async def world(self, tmp_path: Path) -> AsyncIterator[World]:
        async with FakeCluster(tmp_path).serving() as cluster:
            yield FakeWorld(cluster)

    @pytest.fixture
    async def other_world(self, tmp_path: Path) -> AsyncIterator[OtherWorld]:
        kinds = {"localmodelnodes", "configmaps"}
        cluster = FakeCluster(tmp_path, kinds=kinds, keeps={"modelStatus"})
        async with cluster.serving():
            yield OtherFakeWorld(cluster)
