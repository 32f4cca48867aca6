"""Pods that went past the cache are counted and told once, over restarts too; and only those."""

import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from agent import bypasses, usage
from agent.bypasses import Bypasses
from agent.hook.admission import mutate
from agent.hook.decisions import Mutation
from agent.hook.patch import applied
from agent.index import Index
from agent.kube import podspec
from agent.kube.podspec import Pod
from agent.metrics import Metrics
from agent.model import CacheKey
from agent.reconcile import Reconciler
from agent.status import Facts
from agent.usage import Offer
from agent.words import Word
from tests.hook.pods import BUCKET, LLAMA, WORLD, cases, golden

EARLY, CACHED, LATER = (f"2026-01-0{day}T00:00:00Z" for day in (1, 2, 3))
OFFERS = [Offer(uri=c.uri, namespace=c.namespace, since=CACHED) for c in WORLD.caches]
OPENED = 1767225600.0  # EARLY


def pod(
    case: str | dict[str, Any],
    *,
    uid: str = "u",
    created: str = LATER,
    phase: str = "Running",
    notes: dict[str, str] | None = None,
) -> Pod:
    raw = copy.deepcopy(case) if isinstance(case, dict) else golden(case)
    raw["metadata"] |= {"name": uid, "uid": uid, "creationTimestamp": created}
    raw["metadata"]["annotations"] = {**raw["metadata"].get("annotations", {}), **(notes or {})}
    return podspec.pod({**raw, "status": {"phase": phase}})


def past(found: Pod, *, offers: list[Offer] = OFFERS, since: str = EARLY) -> str | None:
    """The URI that it brings itself."""
    result = usage.bypassed(found, offers, since=since)
    return result and result[0]


PAST = {
    "uncached-hf": LLAMA,
    "storage-uris": LLAMA,
    "storage-uris-apart": LLAMA,
    "storage-key-cached-uri": f"{BUCKET}/llama/7b",
}


@pytest.mark.parametrize("case", list(cases()))
def test_of_the_pods_that_kserve_makes_those_with_a_cached_initializer(case: str) -> None:
    found = golden(case)
    assert past(pod(found)) == PAST.get(case)
    decision = mutate(found, WORLD, namespace=found["metadata"]["namespace"])
    if isinstance(decision, Mutation):
        assert past(pod(applied(found, decision.patch))) is None, "the hook helped it"


def test_a_pod_that_names_its_model_and_was_not_given_it() -> None:
    """It has no other way to it: it fails, and nobody else says why."""
    named = {"localmodel-agent.io/source.base": f"{BUCKET}/llama"}
    assert past(pod("oci", notes=named)) == f"{BUCKET}/llama"
    assert past(pod("oci", notes={**named, "localmodel-agent.io/injected": "mounted"})) is None
    assert past(pod("oci", notes={"localmodel-agent.io/sources": BUCKET})) is None


@pytest.mark.parametrize(
    "notes",
    [
        {"localmodel-agent.io/injected": "wrapped: it"},
        {"localmodel-agent.io/keys": "0123456789abcdef"},
        {"localmodel-agent.io/disable": "true"},
        {"serving.kserve.io/disable-localmodel": ""},
        {"storage.kserve.io/readonly": "false"},
    ],
)
def test_who_was_helped_or_wants_no_help_is_none(notes: dict[str, str]) -> None:
    assert past(pod("uncached-hf")) == LLAMA
    assert past(pod("uncached-hf", notes=notes)) is None


def test_who_was_given_a_claim_by_kserve_is_none() -> None:
    """Its initializer, if it has one, brings something else."""
    raw = golden("uncached-hf")
    raw["spec"]["volumes"] = golden("cached-hf")["spec"]["volumes"]
    assert pod("uncached-hf").downloads == (LLAMA,)
    assert pod(raw).downloads == ()


@pytest.mark.parametrize(
    "notes", [{"localmodel-agent.io/disable": "false"}, {"storage.kserve.io/readonly": "true"}]
)
def test_an_opt_out_that_is_none(notes: dict[str, str]) -> None:
    assert past(pod("uncached-hf", notes=notes)) == LLAMA


@pytest.mark.parametrize(
    ("uri", "offered", "is_past"),
    [
        ("s3://b/m", "s3://b/m", True),
        ("s3://b/m/", "s3://b/m", True),
        ("s3://b/m", "s3://b/m/", True),
        ("s3://b/m/deep/er", "s3://b/m", True),
        ("s3://b/m2", "s3://b/m", False),
        ("s3://b", "s3://b/m", False),
        ("hf://b/m", "s3://b/m", False),
    ],
)
def test_what_a_cache_holds_is_a_prefix_of_whole_segments(
    uri: str, offered: str, is_past: bool
) -> None:
    raw = golden("uncached-hf")
    raw["spec"]["initContainers"][0]["args"] = ["hf://other/one", "/mnt/a", uri, "/mnt/b"]
    offers = [Offer(uri=offered, namespace="", since=CACHED)]
    assert past(pod(raw), offers=offers) == (uri if is_past else None)
    # A destination is no source.
    raw["spec"]["initContainers"][0]["args"] = ["hf://other/one", uri]
    assert past(pod(raw), offers=offers) is None


def test_a_cache_of_a_namespace_is_for_its_own_pods() -> None:
    namespace = golden("uncached-hf")["metadata"]["namespace"]
    for found, is_past in ((namespace, True), ("another", False)):
        offers = [Offer(uri=LLAMA, namespace=found, since=CACHED)]
        assert (past(pod("uncached-hf"), offers=offers) is not None) is is_past


def test_who_came_before_the_cache_or_before_we_looked_is_none() -> None:
    """No hook could have helped it; and it must not be told at each start of the agent."""
    for created, is_past in ((EARLY, False), (CACHED, False), (LATER, True)):
        assert (past(pod("uncached-hf", created=created)) is not None) is is_past
    assert past(pod("uncached-hf"), since=LATER) == LLAMA
    assert past(pod("uncached-hf"), since="2026-01-03T00:00:01Z") is None
    unknown = [Offer(uri=LLAMA, namespace="", since="")]
    assert past(pod("uncached-hf"), offers=unknown) is None


def test_who_has_ended_is_none() -> None:
    assert past(pod("uncached-hf", phase="Pending")) == LLAMA
    for phase in ("Succeeded", "Failed"):
        assert past(pod("uncached-hf", phase=phase)) is None


def test_what_a_tenant_writes_does_not_fill_our_memory() -> None:
    raw = golden("uncached-hf")
    raw["spec"]["initContainers"][0]["args"] = ["x" * 3000, "/a", *["y", "/b"] * 1000]
    assert pod(raw).downloads == ("y",) * 15


# -- counted ------------------------------------------------------------------------------------


class Node:
    """Bypasses over one cache that knows nothing."""

    def __init__(self, index: Index, now: float) -> None:
        self.metrics = Metrics()
        self.told: list[tuple[str, str]] = []
        self.bypasses = Bypasses(
            reconciler=cast(Reconciler, self),
            index=index,
            metrics=self.metrics,
            tell=self._tell,
            namespace="localmodel-system",
            clock=lambda: now,
        )

    def facts(self) -> dict[CacheKey, Facts]:
        return {}

    def _tell(self, pod: Pod, word: Word) -> None:
        self.told.append((pod.uid, word.reason))

    async def see(self, *pods: Pod, offers: list[Offer] = OFFERS) -> float | None:
        """How many are counted then."""
        await self.bypasses.see({pod.uid: pod for pod in pods}, offers)
        return self.metrics.registry.get_sample_value("localmodel_pods_bypassed_total")


@asynccontextmanager
async def node(home: Path, *, now: float = OPENED) -> AsyncIterator[Node]:
    index = Index(home / "index.sqlite3", rebuild=lambda: ())
    await index.open()
    try:
        made = Node(index, now)
        await made.bypasses.open()
        yield made
    finally:
        await index.close()


async def test_a_pod_is_counted_and_told_once_also_over_a_restart(tmp_path: Path) -> None:
    pods = [pod("uncached-hf", uid="a"), pod("cached-hf", uid="b")]
    async with node(tmp_path) as found:
        assert [await found.see(*pods) for _ in range(3)] == [1, 1, 1]
        assert found.told == [("a", "CacheBypassed")]
    async with node(tmp_path) as found:
        # One came while no agent was here; it is counted from the first start on.
        assert await found.see(*pods, pod("uncached-hf", uid="c")) == 1
        assert found.told == [("c", "CacheBypassed")]


async def test_it_is_counted_from_the_first_start_on(tmp_path: Path) -> None:
    async with node(tmp_path, now=OPENED + 10 * 86400) as found:
        assert await found.see(pod("uncached-hf")) == 0
    async with node(tmp_path, now=OPENED) as found:
        assert await found.see(pod("uncached-hf")) == 0


async def test_what_is_kept_of_a_pod_goes_with_it(tmp_path: Path) -> None:
    async with node(tmp_path) as found:
        await found.see(pod("uncached-hf", uid="a"), pod("uncached-hf", uid="b"))
        await found.see(pod("uncached-hf", uid="b"))
        assert (await found.bypasses._index.bypasses(0.0))[0] == {"b"}


async def test_an_entry_that_comes_after_the_pod_is_looked_at(tmp_path: Path) -> None:
    """Its cache was there before: only this node did not hear of it yet."""
    async with node(tmp_path) as found:
        assert await found.see(pod("uncached-hf"), offers=[]) == 0
        assert await found.see(pod("uncached-hf")) == 1
        assert await found.see(pod("uncached-hf"), offers=OFFERS[:1]) == 1


async def test_a_pod_is_compared_once_with_the_same_offers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant may write many URIs, and a node may have many models."""
    compared: list[str] = []

    def counted(pod: Pod, offers: list[Offer], *, since: str) -> None:
        compared.append(pod.uid)

    monkeypatch.setattr(bypasses, "bypassed", counted)
    async with node(tmp_path) as found:
        for _ in range(3):
            await found.see(pod("uncached-hf", uid="a"))
        await found.see(pod("uncached-hf", uid="a"), pod("uncached-hf", uid="b"))
    assert compared == ["a", "b"]
