"""The credentials of a cache, read by name from an API server that behaves as a test says."""

import base64
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from agent.access import Access
from agent.errors import AgentError, Reason
from agent.kube.client import Api
from agent.kube.credentials import CONFIG_MAP, Kind, Need
from agent.kube.parse import node
from agent.model import ModelRef, Want
from agent.sources import OWN, Given
from tests.cluster.nodes import storage_container
from tests.contracts.cluster_contract import Noting, opened
from tests.contracts.test_cluster import FakeWorld
from tests.fakes.cluster import FakeCluster

URI = "hf://acme/tiny"
JOBS = "/api/v1/namespaces/kserve-localmodel-jobs"
SECRET = "hf_0123456789_sesame"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[FakeWorld]:
    async with FakeCluster(tmp_path).serving() as cluster:
        yield FakeWorld(cluster)


@pytest.fixture
async def api(world: FakeWorld) -> AsyncIterator[Noting]:
    async with opened(world) as api:
        yield api


def _want(uri: str = URI, **entry: Any) -> Want:
    raw = {"modelName": "tiny", "sourceModelUri": uri, **entry}
    found = node(
        {
            "metadata": {"name": "n", "uid": "u", "resourceVersion": "1"},
            "spec": {"localModels": [raw]},
        }
    )
    return Want(ref=ModelRef(uri=uri), access=found.entries[0].access)


def _secret(name: str, **data: str) -> dict[str, Any]:
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
    return {"metadata": {"name": name}, "data": encoded}


class _Clock:
    now = 0.0


def _access(
    api: Api, clock: _Clock | None = None, *, containers: Sequence[Any] = (), **watched: Any
) -> Access:
    """`watched`: the data of KServe's ConfigMap, as JSON; `containers`: its storage containers."""
    at = clock or _Clock()
    config = {"data": {name: json.dumps(value) for name, value in watched.items()}}

    def read(need: Need) -> tuple[bool, Any]:
        if need.kind is Kind.STORAGE_CONTAINERS:
            return True, {"items": list(containers)}
        return need.name == CONFIG_MAP, config

    return Access(
        api,
        config_namespace="kserve",
        watched=read,
        authorities=lambda bundle: f"/file/of/{bundle}",
        ticks=lambda: at.now,
    )


async def test_who_names_nothing_uses_what_the_agent_has(api: Noting, world: FakeWorld) -> None:
    assert await _access(api).given(Want(ref=ModelRef(uri=URI))) == OWN
    assert await _access(api).given(_want()) == OWN


async def test_who_is_given_patterns_alone_uses_what_the_agent_has(
    api: Noting, world: FakeWorld
) -> None:
    """A container that only chooses files does not take the agent's token away; one that names
    credentials does."""
    patterns = {"name": "STORAGE_ALLOW_PATTERNS", "value": "*.safetensors"}
    token = {"name": "HF_TOKEN", "value": SECRET}
    for env, given in (([patterns], OWN), ([patterns, token], Given({"HF_TOKEN": SECRET}))):
        container = storage_container("c", "hf://", *env)
        assert await _access(api, containers=[container]).given(_want()) == given


async def test_a_key_of_storage_config_is_found_and_kept_for_a_minute(
    api: Noting, world: FakeWorld
) -> None:
    entry = json.dumps({"type": "hf", "token": SECRET})
    await world.cluster.put(f"{JOBS}/secrets/storage-config", _secret("storage-config", hub=entry))
    clock = _Clock()
    access, want = _access(api, clock), _want(storage={"key": "hub"})
    assert await access.given(want) == Given({"HF_TOKEN": SECRET})
    asked = sum(world.cluster.requests.values())
    for _ in range(50):
        assert await access.given(want) == Given({"HF_TOKEN": SECRET})
    assert sum(world.cluster.requests.values()) == asked
    changed = _secret("storage-config", hub=json.dumps({"type": "hf", "token": "another"}))
    await world.cluster.put(f"{JOBS}/secrets/storage-config", changed)
    clock.now = 61.0
    assert await access.given(want) == Given({"HF_TOKEN": "another"})


async def test_a_service_account_leads_to_its_secrets(api: Noting, world: FakeWorld) -> None:
    account = {"metadata": {"name": "puller"}, "secrets": [{"name": "hub-token"}]}
    await world.cluster.put(f"{JOBS}/serviceaccounts/puller", account)
    await world.cluster.put(f"{JOBS}/secrets/hub-token", _secret("hub-token", HF_TOKEN=SECRET))
    found = await _access(api).given(_want(serviceAccountName="puller"))
    assert found.environment is not None
    assert found.environment["HF_TOKEN"] == SECRET
    assert SECRET not in repr(found)


async def test_what_is_named_and_missing_is_said_and_heals(api: Noting, world: FakeWorld) -> None:
    access, want = _access(api), _want(storage={"key": "hub"})
    with pytest.raises(AgentError) as caught:
        await access.given(want)
    assert caught.value.reason is Reason.UNAUTHORIZED
    assert "kserve-localmodel-jobs/storage-config" in caught.value.message
    entry = json.dumps({"type": "hf", "token": SECRET})
    await world.cluster.put(f"{JOBS}/secrets/storage-config", _secret("storage-config", hub=entry))
    assert await access.given(want) == Given({"HF_TOKEN": SECRET})


async def test_a_malformed_secret_is_named_and_not_shown(api: Noting, world: FakeWorld) -> None:
    bad = _secret("storage-config", hub=f'{{"type": "hf", "token": "{SECRET}"')
    await world.cluster.put(f"{JOBS}/secrets/storage-config", bad)
    with pytest.raises(AgentError) as caught:
        await _access(api).given(_want(storage={"key": "hub"}))
    assert SECRET not in caught.value.message
    assert "storage-config" in caught.value.message


async def test_what_a_container_could_and_we_cannot_is_refused(
    api: Noting, world: FakeWorld
) -> None:
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/models"}
    account = {"metadata": {"name": "irsa", "annotations": role}, "secrets": []}
    await world.cluster.put(f"{JOBS}/serviceaccounts/irsa", account)
    with pytest.raises(AgentError) as caught:
        await _access(api).given(_want("s3://bucket/x", serviceAccountName="irsa"))
    assert caught.value.reason is Reason.UNAUTHORIZED
    assert "IRSA" in caught.value.message


CONFIG_MAPS = "/api/v1/namespaces/kserve/configmaps"
BUNDLE: dict[str, Any] = {"storageInitializer": {"caBundleConfigMapName": "bundle"}}


async def test_9_1_10_the_clusters_ca_bundle_is_trusted_for_every_cache(
    api: Noting, world: FakeWorld
) -> None:
    await world.put(f"{CONFIG_MAPS}/bundle", {"data": {"cabundle.crt": "PEM"}})
    access = _access(api, None, **BUNDLE)
    assert await access.given(_want()) == Given(None, "/file/of/PEM")


@pytest.mark.parametrize("status", [403, 404])
async def test_a_clusters_ca_bundle_that_cannot_be_had_stops_nobody(
    api: Noting, world: FakeWorld, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """TLS says so where a server needs it; the log says why, once."""
    world.cluster.faults.instead = lambda request: web.json_response({}, status=status)
    clock = _Clock()
    access = _access(api, clock, **BUNDLE)
    for clock.now in (0.0, 61.0, 122.0):
        assert await access.given(_want()) == OWN
    assert caplog.text.count("ConfigMap kserve/bundle, which KServe's configuration names") == 1


async def test_a_ca_bundle_of_credentials_is_read_in_the_job_namespace(
    api: Noting, world: FakeWorld
) -> None:
    entry = json.dumps({"type": "s3", "cabundle_configmap": "mine"})
    await world.put(f"{JOBS}/secrets/storage-config", _secret("storage-config", minio=entry))
    access, want = _access(api), _want("s3://bucket/x", storage={"key": "minio"})
    with pytest.raises(AgentError, match="kserve-localmodel-jobs/mine") as caught:
        await access.given(want)
    assert caught.value.reason is Reason.UNAUTHORIZED
    await world.put(f"{JOBS}/configmaps/mine", {"data": {"cabundle.crt": "PEM"}})
    assert (await access.given(want)).authorities == "/file/of/PEM"


async def test_a_ca_bundle_that_is_none_says_where_it_is_from(
    api: Noting, world: FakeWorld
) -> None:
    await world.put(f"{CONFIG_MAPS}/bundle", {"data": {"cabundle.crt": "PEM"}})
    access = _access(api, None, **BUNDLE)

    def refuse(bundle: str) -> str:
        raise AgentError(Reason.UNAUTHORIZED, "no certificate")

    access._authorities = refuse
    with pytest.raises(AgentError, match=r"no certificate \(from ConfigMap kserve/bundle\)"):
        await access.given(_want())
