"""Objects: what is taken from them, what is refused naming the field; nothing else happens."""

import asyncio
import copy
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import usage
from agent.cluster import Cluster
from agent.config import Settings
from agent.errors import AgentError, Reason
from agent.kube import parse, podspec
from agent.kube.client import Api, Json
from agent.kube.parse import cache, fingerprint, patterns
from agent.kube.watch import Watch
from agent.model import CacheKey, FilePolicy, ModelRef, Want, cache_key
from agent.reconcile import Reconciler
from agent.sources import scheme_of
from agent.wishes import of_node
from tests.cluster.nodes import local_model_node
from tests.contracts.cluster_contract import eventually, nothing, running
from tests.fakes.cluster import FakeCluster
from tests.machine import cache_yaml

URI = "hf://acme/tiny"
GOOD: dict[str, Any] = json.loads(
    cache_yaml(
        "tiny",
        URI,
        include="*.safetensors, *.json,",
        exclude="old/*",
        priority="-3",
        expect_fingerprint="sha256:" + "a" * 64,
    )
)


def test_everything_we_understand_is_taken() -> None:
    found = cache(GOOD)
    assert found.name == "tiny"
    assert found.want == Want(
        ref=ModelRef(uri=URI, include=("*.safetensors", "*.json"), exclude=("old/*",)),
        names=frozenset({"tiny"}),
        priority=-3,
        expect_fingerprint="sha256:" + "a" * 64,
        floor=2**30,
    )


def test_how_long_and_when_it_is_kept_is_taken() -> None:
    raw = json.loads(
        cache_yaml("a", URI, policy="on-demand", ttl="72h", retain="0s", pin="true", refresh="2")
    )
    assert cache(raw).want == Want(
        ref=ModelRef(uri=URI),
        names=frozenset({"a"}),
        on_demand=True,
        pinned=True,
        ttl_seconds=259200.0,
        retain_seconds=0.0,
        refresh="2",
        floor=2**30,
    )


@pytest.mark.parametrize(
    ("limit", "size"),
    [("500Gi", 500 * 2**30), (1024, 1024), ("0", None), (None, None), ("much", None), ([], None)],
)
def test_the_limit_of_a_group_is_taken_where_it_can_be_read(limit: object, size: object) -> None:
    """KServe does not read it: what nobody could ever read must not stop a node."""
    raw = {"metadata": {"name": "g"}, "spec": {"storageLimit": limit}}
    assert parse.group(raw).limit == size


@pytest.mark.parametrize(
    ("said", "policy"),
    [
        (None, None),
        ("off", FilePolicy.OFF),
        ("warn", FilePolicy.WARN),
        ("refuse", FilePolicy.REFUSE),
        ("Warn", FilePolicy.REFUSE),
        ("", FilePolicy.REFUSE),
    ],
)
def test_a_file_policy_that_nobody_knows_is_the_strictest(
    said: str | None, policy: FilePolicy | None
) -> None:
    notes = {} if said is None else {"localmodel-agent.io/file-policy": said}
    assert parse.group({"metadata": {"name": "g", "annotations": notes}}).file_policy is policy


def test_annotations_of_others_and_unknown_ones_of_ours_do_not_matter() -> None:
    raw = copy.deepcopy(GOOD)
    raw["metadata"]["annotations"] = {"other/include": 7, "localmodel-agent.io/later": "x", 5: 6}
    assert cache(raw).want.ref == ModelRef(uri=URI)
    raw["metadata"]["annotations"] = None
    assert cache(raw).want.ref == ModelRef(uri=URI)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("apiVersion", "serving.kserve.io/v1", "apiVersion is 'serving.kserve.io/v1'"),
        ("apiVersion", None, "apiVersion is of type NoneType"),
        ("kind", "LocalModelNode", "kind is 'LocalModelNode'"),
        ("metadata", [], "metadata is missing"),
        ("metadata.name", None, "metadata.name of type NoneType"),
        ("metadata.name", 7, "metadata.name of type int"),
        ("metadata.name", "../../x", "metadata.name '../../x'"),
        ("metadata.annotations", {"localmodel-agent.io/policy": "lazy"}, "eager or on-demand"),
        ("metadata.annotations", {"localmodel-agent.io/ttl": "1h"}, "needs localmodel-agent.io"),
        ("metadata.annotations", {"localmodel-agent.io/retain": "1y"}, "is not a duration"),
        ("metadata.annotations", {"localmodel-agent.io/pin": "yes"}, "is not false or true"),
        ("metadata.name", "a/b", "metadata.name 'a/b'"),
        ("metadata.name", ".hidden", "metadata.name '.hidden'"),
        ("metadata.name", "n" * 254, "is not a name"),
        ("metadata.name", "tiny\n", "is not a name"),
        ("spec", None, "spec is missing"),
        ("spec.sourceModelUri", "", "spec.sourceModelUri ''"),
        ("spec.sourceModelUri", ["x"], "spec.sourceModelUri of type list"),
        ("spec.sourceModelUri", "hf://a/b\nc", "is not a URI"),
        ("metadata.annotations", ["x"], "metadata.annotations is not an object"),
        ("metadata.annotations", {"localmodel-agent.io/include": 5}, "quote its value"),
        ("metadata.annotations", {"localmodel-agent.io/include": "a\nb"}, "control characters"),
        ("metadata.annotations", {"localmodel-agent.io/priority": "high"}, "not an integer"),
        (
            "metadata.annotations",
            {"localmodel-agent.io/expect-fingerprint": "sha256:AB"},
            "not sha256:<64 hex digits>",
        ),
    ],
)
def test_what_is_wrong_is_named(path: str, value: object, says: str) -> None:
    raw = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(AgentError) as caught:
        cache(raw)
    assert caught.value.reason is Reason.INVALID_SPEC
    assert says in caught.value.message
    assert caught.value.message.isprintable()


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=5,
)


@given(
    _ANY,
    st.sampled_from(
        ["apiVersion", "kind", "metadata", "spec", "metadata.name", "metadata.annotations"]
    ),
)
def test_any_value_anywhere_is_taken_or_refused(value: Any, path: str) -> None:
    raw = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    place[last] = value
    with suppress(AgentError):  # and nothing else
        cache(raw)
    with pytest.raises(AgentError):
        cache([value])


def test_patterns_and_fingerprints() -> None:
    assert patterns("") == ()
    assert patterns(" a , ,b/* ") == ("a", "b/*")
    assert fingerprint(None) is None
    for wrong in ("", "sha256:", "a" * 64, "sha256:" + "A" * 64, "sha256:" + "a" * 65):
        with pytest.raises(AgentError):
            fingerprint(wrong)


# -- what a node watches --------------------------------------------------------------------------

PARSERS: dict[str, Callable[[Json], Any]] = {
    "node": parse.node,
    "pod": podspec.pod,
    "group": parse.group,
    "cache": lambda raw: parse.cache_meta(raw, "LocalModelCache"),
}
REFUSALS = (AgentError, LookupError, TypeError, AttributeError, ValueError)
"""What Watch takes for "this object cannot be understood"."""

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def _or_any(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly as it should be: what is wrong at the top hides what is below it."""
    return st.one_of(good, good, good, good, good, _JSON)


def _object(**known: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    values = {name: _or_any(value) for name, value in known.items()}
    return _or_any(st.fixed_dictionaries({}, optional=values))


def _list(of: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return _or_any(st.lists(of, max_size=2))


_TEXT = st.text(max_size=5)
_NAMES = st.dictionaries(st.sampled_from(["model", "node", "control-plane"]), _or_any(_TEXT))
_NOTES = st.dictionaries(st.sampled_from([podspec.KEYS, podspec.INJECTED, "other"]), _or_any(_TEXT))
_MOUNT = _object(
    name=st.just("v"),
    mountPath=st.just("/models"),
    subPath=st.sampled_from(["models/0123456789abcdef/", "", "/", "x"]),
    subPathExpr=st.sampled_from(["models/$(X)", "$(", ""]),
)
_CONTAINERS = _list(
    _object(
        name=st.just(podspec.INITIALIZER),
        args=_list(st.sampled_from(["hf://a/b", "/mnt/models"])),
        volumeMounts=_list(_MOUNT),
    )
)
_VOLUME = _object(
    name=st.sampled_from(["v", "kserve-pvc-source"]),
    hostPath=_object(path=st.sampled_from(["/models", "/", ""])),
    persistentVolumeClaim=_object(claimName=_TEXT),
)
_METADATA = _object(
    name=_TEXT,
    namespace=_TEXT,
    uid=_TEXT,
    resourceVersion=_TEXT,
    creationTimestamp=_TEXT,
    labels=_NAMES,
    ownerReferences=_list(_object(kind=st.just("Job"))),
    annotations=_NOTES,
)
_ENTRY = _object(
    modelName=_TEXT, namespace=_TEXT, sourceModelUri=st.just("hf://a/b"), nodeGroup=st.just("gpu")
)
_SOURCE = _object(path=st.sampled_from(["/models", "/else"]))
_SPEC = _object(
    localModels=_list(_ENTRY),
    persistentVolumeSpec=_object(local=_SOURCE, hostPath=_SOURCE),
    volumes=_list(_VOLUME),
    containers=_CONTAINERS,
    initContainers=_CONTAINERS,
    ephemeralContainers=_CONTAINERS,
)
ANYTHING = _object(metadata=_METADATA, spec=_SPEC, status=_object(phase=_TEXT))


WELL_FORMED: Json = {
    "metadata": {
        "name": "n",
        "namespace": "ns",
        "uid": "u",
        "resourceVersion": "1",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": {"model": "m", "node": "n"},
        "ownerReferences": [{"kind": "Job"}],
        "annotations": {podspec.KEYS: "0123456789abcdef", "localmodel-agent.io/priority": "1"},
    },
    "spec": {
        "localModels": [
            {"modelName": "m", "namespace": "ns", "sourceModelUri": URI, "nodeGroup": "gpu"}
        ],
        "persistentVolumeSpec": {"local": {"path": "/models"}},
        "volumes": [
            {"name": "v", "hostPath": {"path": "/models"}},
            {"name": "kserve-pvc-source", "persistentVolumeClaim": {"claimName": "c"}},
        ],
        "containers": [
            {
                "volumeMounts": [
                    {"name": "v", "mountPath": "/models", "subPathExpr": "models/$(X)"},
                    {"name": "kserve-pvc-source", "mountPath": "/m", "subPath": "models/x/"},
                ]
            }
        ],
        "initContainers": [{"name": podspec.INITIALIZER, "args": [URI, "/mnt/models"]}],
    },
    "status": {"phase": "Running", "modelStatus": {}},
}


def _everywhere(raw: Any) -> Iterator[list[str | int]]:
    places = raw.items() if isinstance(raw, dict) else enumerate(raw)
    for place, value in places:
        yield [place]
        if isinstance(value, dict | list):
            yield from ([place, *below] for below in _everywhere(value))


@pytest.mark.parametrize("value", [None, True, 7, 0.5, "", "x", [], [7], ["x"], {}, {"x": 7}])
def test_one_wrong_value_anywhere_is_worked_with_or_refused(value: Any) -> None:
    for *parents, last in _everywhere(WELL_FORMED):
        raw = copy.deepcopy(WELL_FORMED)
        place: Any = raw
        for parent in parents:
            place = place[parent]
        place[last] = value
        with suppress(*REFUSALS):
            _check_texts(pod := podspec.pod(raw))
            _use_pods({"p": pod})
        for found in (raw, WELL_FORMED):
            with suppress(*REFUSALS):
                objects = parse.node(found), parse.group(raw), PARSERS["cache"](raw)
                for each in objects:
                    _check_texts(each)
                _use_objects(*objects)


def _check_texts(found: Any) -> None:
    for field in fields(found):
        if field.type is str:
            assert isinstance(getattr(found, field.name), str), field.name


@given(ANYTHING, st.sampled_from(sorted(PARSERS)))
def test_any_json_parses_or_is_refused(raw: Any, kind: str) -> None:
    with suppress(*REFUSALS):
        _check_texts(PARSERS[kind](raw))


@given(ANYTHING, ANYTHING, ANYTHING, ANYTHING)
def test_what_parses_can_be_worked_with(node: Any, pod: Any, group: Any, meta: Any) -> None:
    """Nobody looks at a field a second time."""
    with suppress(*REFUSALS):
        pods = {"p": podspec.pod(pod)}
        _use_pods(pods)
    with suppress(*REFUSALS):
        objects = parse.node(node), parse.group(group), PARSERS["cache"](meta)
        _use_objects(*objects)


def _use_pods(pods: dict[str, podspec.Pod]) -> None:
    try:
        usage.rival(pods.values())
        usage.served_at("/models", pods.values(), "a/b")
        usage.holder_is_gone("p", pods)
        for pod in pods.values():
            usage.keys_of(pod, present=(), groups=["c"], served="/models")
            usage.bypassed(pod, [usage.Offer(uri="hf://a", namespace="", since="1")], since="")
    except REFUSALS as error:
        raise AssertionError(f"{pods} cannot be worked with") from error


def _use_objects(node: parse.NodeObject, group: parse.Group, meta: parse.CacheMeta) -> None:
    try:
        metas = {(entry.namespace, entry.model): meta for entry in node.entries}
        of_node(node, metas, {"gpu": group}, check=scheme_of, served="/models")
    except REFUSALS as error:
        raise AssertionError(f"{node}, {group}, {meta} cannot be worked with") from error


class Told(Api):
    """An API server that says this once, and nothing more."""

    def __init__(self, listed: list[Json], watched: list[Json]) -> None:
        self._listed = listed
        self._watched = watched
        self.done = asyncio.Event()

    async def list(
        self, path: str, params: Mapping[str, str] | None = None, *, metadata: str = ""
    ) -> Json:
        return {"metadata": {"resourceVersion": "1"}, "items": self._listed}

    async def watch(
        self, path: str, params: Mapping[str, str], *, metadata: str = ""
    ) -> AsyncGenerator[Json, None]:
        yield {}
        for raw in self._watched:
            yield {"type": "MODIFIED", "object": raw}
        self.done.set()
        await asyncio.Event().wait()


def _named(raw: Any, name: str) -> Json:
    """What the server vouches for, whatever else it says: a name, an identity and a version."""
    body = dict(raw) if isinstance(raw, dict) else {"spec": raw}
    metadata = body.get("metadata")
    own = {"name": name, "namespace": "", "uid": name, "resourceVersion": "2"}
    return {**body, "metadata": {**(metadata if isinstance(metadata, dict) else {}), **own}}


@given(
    st.lists(ANYTHING, max_size=3), st.lists(ANYTHING, max_size=3), st.sampled_from(sorted(PARSERS))
)
def test_objects_that_nobody_understands_stop_no_other(
    listed: list[Any], watched: list[Any], kind: str
) -> None:
    async def check() -> None:
        api = Told(
            [*(_named(raw, f"l{n}") for n, raw in enumerate(listed)), _named({}, "good")],
            [*(_named(raw, f"w{n}") for n, raw in enumerate(watched)), _named({}, "last")],
        )
        watch = Watch(api, "/things", parse=PARSERS[kind], changed=nothing)
        async with running(watch.run()):
            await asyncio.wait_for(api.done.wait(), 10)
            assert {"good", "last"} <= watch.objects.keys()
            names = {
                *(f"l{n}" for n in range(len(listed))),
                *(f"w{n}" for n in range(len(watched))),
            }
            assert watch.objects.keys() | watch.unreadable == names | {"good", "last"}
            assert not watch.objects.keys() & watch.unreadable

    asyncio.run(check())


async def test_what_could_not_be_understood_and_goes_is_a_change() -> None:
    """Until then nobody knew what it was, and things waited for it."""
    raw = _named({}, "a")
    api, changes = Told([], []), []

    def refuse(raw: Json) -> Json:
        raise ValueError("bad")

    watch = Watch(api, "/things", parse=refuse, changed=lambda: changes.append(len(changes)))
    watch._take({"type": "ADDED", "object": raw})
    assert (watch.unreadable, len(changes)) == ({"a"}, 1)
    watch._take({"type": "DELETED", "object": raw})
    assert (watch.unreadable, len(changes)) == (set(), 2)


async def test_of_a_pod_that_cannot_be_understood_nobody_knows_what_it_uses(
    tmp_path: Path,
) -> None:
    """So all is in use, as far as anybody can tell, until it is mended or gone."""
    path = "/api/v1/namespaces/default/pods"
    good: Json = {
        "spec": {
            "nodeName": "n",
            "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}],
            "containers": [
                {
                    "volumeMounts": [
                        {"name": "v", "subPath": f"models/{cache_key(URI)}/", "mountPath": "/m"}
                    ]
                }
            ],
        }
    }
    bad: Json = {"spec": {"nodeName": "n", "volumes": 7}}
    async with FakeCluster(tmp_path).serving() as server:
        await server.put(f"{path}/good", good)
        api = Api({"KUBECONFIG": str(server.kubeconfig)}, user_agent="test")
        await api.open()
        try:
            used = frozenset({cache_key(URI)})
            cluster = Cluster(api, Settings(root=tmp_path / "cache", node_name="n"))
            assert await cluster.in_use() is None, "no list has come yet"
            async with running(*cluster.work()):
                await cluster.listed()
                assert await cluster.in_use() == used
                assert await cluster.in_use_now() == used
                await server.put(f"{path}/bad", bad)
                await eventually(lambda: _unknown(cluster))
                assert await cluster.in_use() is None
                assert await cluster.in_use_now() is None
                await server.delete(f"{path}/bad")
                await eventually(lambda: not _unknown(cluster))
                assert await cluster.in_use() == used
                assert await cluster.in_use_now() == used
                server.faults.refuse = True
                assert await cluster.in_use_now() is None
                server.faults.refuse = False
        finally:
            await api.close()


async def test_a_group_that_is_gone_is_known_by_the_entries_that_name_it(tmp_path: Path) -> None:
    whole: Json = {
        "spec": {
            "nodeName": "n",
            "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "tiny-gpu"}}],
            "containers": [{"volumeMounts": [{"name": "v", "mountPath": "/m"}]}],
        }
    }
    entry = {"modelName": "tiny", "sourceModelUri": URI, "nodeGroup": "gpu"}
    nodes = "/apis/serving.kserve.io/v1alpha1/localmodelnodes"
    async with FakeCluster(tmp_path).serving() as server:
        await server.put("/api/v1/namespaces/d/pods/whole", whole)
        await server.put(f"{nodes}/n", local_model_node("n", entry))
        api = Api({"KUBECONFIG": str(server.kubeconfig)}, user_agent="test")
        await api.open()
        try:
            cluster = Cluster(api, Settings(root=tmp_path / "cache", node_name="n"))
            cluster.manages(cast("Reconciler", _Holds()))
            async with running(*cluster.work()):
                await cluster.listed()
                assert await cluster.in_use() == frozenset({cache_key(URI)})
                await server.put(f"{nodes}/n", local_model_node("n"))
                await eventually(lambda: not cluster.desired().wants)
                assert await cluster.in_use() == frozenset({cache_key(URI)}), "its pod has not left"
        finally:
            await api.close()


class _Holds:
    """What a Reconciler would say."""

    ready = asyncio.Event()

    def present(self) -> frozenset[CacheKey]:
        return frozenset({cache_key(URI)})


def _unknown(cluster: Cluster) -> bool:
    return bool(cluster._pods.unreadable)
