"""Pods that wait for a model are told so: each thing once, and how far it is once a minute."""

from dataclasses import replace
from typing import cast

import pytest

from agent.kube import podspec
from agent.kube.podspec import Pod
from agent.model import Block, Blocked, CacheKey, Entry, Job, ModelRef, Stage, cache_key
from agent.reconcile import Reconciler
from agent.status import Facts
from agent.waiting import Waiting
from agent.wishes import Desired
from agent.words import Word
from tests.contracts.cluster_contract import Ticks

URI = "hf://acme/tiny"
KEY = cache_key(URI)
DESIRED = Desired(wants={}, names={})
COMING = Facts(key=KEY, ref=ModelRef(uri=URI), wanted=True)
SHORT = replace(COMING, block=Block(why=Blocked.INSUFFICIENT_CAPACITY, message="needs 1Gi more"))
HERE = replace(
    COMING,
    entry=Entry(
        ref=COMING.ref,
        revision="r",
        fingerprint="sha256:00",
        bytes=1,
        files=1,
        sealed_at=0.0,
        last_used=0.0,
    ),
)


def fetching(done: int) -> Facts:
    return replace(COMING, job=Job(key=KEY, stage=Stage.FETCHING, total=1000, done=done))


def pod(uid: str, *, phase: str = "Pending") -> Pod:
    metadata = {"name": uid, "namespace": "team", "uid": uid, "annotations": {podspec.KEYS: KEY}}
    claim = {"name": "cache", "persistentVolumeClaim": {"claimName": "localmodel-gpu"}}
    server = {"volumeMounts": [{"name": "cache", "mountPath": "/mnt/localmodel"}]}
    spec = {"containers": [server], "volumes": [claim]}
    return podspec.pod({"metadata": metadata, "spec": spec, "status": {"phase": phase}})


class Node:
    """Waiting over one cache, of which a test says what it knows."""

    def __init__(self) -> None:
        self.known: dict[CacheKey, Facts] = {}
        self.ticks = Ticks()
        self.told: list[tuple[str, str, str]] = []
        self._waiting = Waiting(cast(Reconciler, self), self._tell, ticks=self.ticks)

    def facts(self) -> dict[CacheKey, Facts]:
        return self.known

    def _tell(self, pod: Pod, word: Word) -> None:
        self.told.append((pod.uid, word.reason, word.message))

    def see(self, *pods: Pod, after: float = 0.0, model: Facts | None = None) -> list[str]:
        """The reasons of what is told then."""
        self.ticks.now += after
        if model is not None:
            self.known = {KEY: model}
        self.told.clear()
        self._waiting.see({pod.uid: (pod, pod.keys) for pod in pods}, DESIRED)
        return [reason for _, reason, _ in self.told]


@pytest.fixture
def node() -> Node:
    return Node()


def test_a_pod_is_told_that_it_waits_and_that_it_does_not_any_more(node: Node) -> None:
    assert node.see(pod("a"), model=COMING) == []
    assert node.see(pod("a"), after=5, model=fetching(300)) == ["WaitsForModel"]
    assert "300 of 1000" in node.told[0][2]
    assert node.see(pod("a"), after=5) == []
    assert node.see(pod("a"), after=5, model=HERE) == ["ModelReady"]
    assert node.see(pod("a"), after=600) == []


def test_whose_model_is_here_soon_is_told_nothing(node: Node) -> None:
    assert node.see(pod("a"), model=COMING) == []
    assert node.see(pod("a"), after=4) == []
    assert node.see(pod("a"), after=4, model=HERE) == []
    assert node.see(pod("b"), after=600) == []
    assert node.see(pod("b"), after=600) == []


def test_an_entry_that_comes_a_moment_after_its_pod_is_no_warning(node: Node) -> None:
    assert node.see(pod("a")) == []
    assert node.see(pod("a"), after=3, model=COMING) == []
    assert node.see(pod("a"), after=3) == ["WaitsForModel"]
    other = Node()
    other.see(pod("a"))
    assert other.see(pod("a"), after=5) == ["NotAskedFor"]


def test_how_far_it_is_is_said_once_a_minute(node: Node) -> None:
    node.see(pod("a"), model=fetching(0))
    assert node.see(pod("a"), after=10, model=fetching(100)) == ["WaitsForModel"]
    said = [node.see(pod("a"), after=10, model=fetching(200 + n)) for n in range(12)]
    assert said == [[], [], [], [], [], ["WaitsForModel"]] * 2


def test_who_waits_long_is_told_before_the_server_has_forgotten(node: Node) -> None:
    """Or if the server was away when it was said first."""
    node.see(pod("a"))
    assert node.see(pod("a"), after=5) == ["NotAskedFor"]
    said = [node.see(pod("a"), after=100) for _ in range(12)]
    assert said == [[], [], [], [], [], ["NotAskedFor"]] * 2


def test_another_state_is_said_at_once(node: Node) -> None:
    node.see(pod("a"), model=COMING)
    assert node.see(pod("a"), after=5) == ["WaitsForModel"]
    assert node.see(pod("a"), after=1, model=SHORT) == ["InsufficientCapacity"]
    assert node.see(pod("a"), after=1, model=fetching(0)) == ["WaitsForModel"]


def test_a_pod_that_starts_before_we_look_again_is_told_why(node: Node) -> None:
    node.see(pod("a"), pod("b"), model=COMING)
    node.see(pod("a"), pod("b"), after=5)
    started = pod("a", phase="Running"), pod("b", phase="Running")
    assert node.see(*started, after=5, model=HERE) == ["ModelReady", "ModelReady"]
    assert node.see(*started, after=600) == []
    # A repair of what it reads is no waiting of its own.
    assert node.see(*started, after=600, model=COMING) == []


def test_a_pod_that_started_with_what_it_fetched_itself_is_left_in_peace(node: Node) -> None:
    node.see(pod("a"), model=SHORT)
    assert node.see(pod("a"), after=5) == ["InsufficientCapacity"]
    assert node.see(pod("a", phase="Running"), after=5, model=fetching(1)) == []
    assert node.see(pod("a", phase="Running"), after=5, model=HERE) == []


def test_a_running_pod_waits_for_nothing(node: Node) -> None:
    for after in (0, 10, 600):
        assert node.see(pod("a", phase="Running"), after=after, model=COMING) == []


def test_pods_are_told_apart_and_forgotten(node: Node) -> None:
    node.see(pod("a"), model=COMING)
    assert node.see(pod("a"), pod("b"), after=5) == ["WaitsForModel"]
    assert node.see(pod("b"), after=5) == ["WaitsForModel"]
    assert node.told[0][0] == "b"
    assert list(node._waiting._told) == ["b"]
