"""Pods that nobody recorded: generated ones, each of which the API server takes as it is.

Three shapes, as the hook knows them, and around them whatever a pod may have besides: other
volumes, affinity of all kinds, missing lists, lists that are null.
"""

from typing import Any

from hypothesis import strategies as st

from agent.kube.podspec import KSERVE_CLAIM, KSERVE_LABEL
from agent.model import cache_key
from tests.hook.pods import A100, BUCKET, LLAMA, LLAMA_70B, PRODUCT, golden, plain, selector

Pod = dict[str, Any]
Objects = st.SearchStrategy[dict[str, Any]]

CACHED = (LLAMA, LLAMA_70B, f"{BUCKET}/llama/7b", f"{BUCKET}/it's $(here)/x")
_NO_CACHE = ("hf://nobody/asked", "s3://bucket/model")
_GPU = {"limits": {"nvidia.com/gpu": "1"}}
_FILLING = 256 * 1024
"""What all annotations of an object may take together, in bytes."""

_VOLUMES: tuple[dict[str, Any], ...] = (
    {"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
    {"hostPath": {"path": "/var/log", "type": "Directory"}},
    {"nfs": {"server": "nfs.example.com", "path": "/"}},
    {"configMap": {"name": "c", "optional": True, "items": [{"key": "k", "path": "p/k"}]}},
    {"secret": {"secretName": "s", "defaultMode": 0o400}},
    {"projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}},
    {"csi": {"driver": "inline.example.com", "readOnly": True}},
    {"ephemeral": {"volumeClaimTemplate": {"spec": {
        "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}
    }}}},
    {"downwardAPI": {"items": [{"path": "l", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
    {"persistentVolumeClaim": {"claimName": "mine"}},
    {"persistentVolumeClaim": {"claimName": "localmodel-gpu1"}},
)  # fmt: skip

_TERM = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"a": "b"}}}
_WEIGHTED = {"weight": 100, "podAffinityTerm": _TERM}
_PREFERENCE = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["z"]}]}


def _some(required: dict[str, Any], **optional: st.SearchStrategy[Any]) -> Objects:
    """What is optional may be missing, or null."""
    known = {name: st.just(value) for name, value in required.items()}
    return st.fixed_dictionaries(
        known, optional={name: st.none() | found for name, found in optional.items()}
    )


_AFFINITY = _some(
    {},
    nodeAffinity=_some(
        {},
        requiredDuringSchedulingIgnoredDuringExecution=st.just(selector(A100)),
        preferredDuringSchedulingIgnoredDuringExecution=st.lists(
            st.just({"weight": 1, "preference": _PREFERENCE}), max_size=2
        ),
    ),
    podAffinity=_some(
        {}, preferredDuringSchedulingIgnoredDuringExecution=st.just([_WEIGHTED])
    ),
    podAntiAffinity=_some(
        {}, requiredDuringSchedulingIgnoredDuringExecution=st.just([_TERM])
    ),
)  # fmt: skip

_NOTES = st.dictionaries(
    st.sampled_from(["example.com/a.b_c", "plain", "x/y", "sidecar.istio.io/inject"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(["~", "~1/"]),
    max_size=3,
)

_VARIABLES: tuple[dict[str, Any], ...] = (
    {"name": "CONFIDENTIAL_ENABLED", "value": "false"},
    {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
    {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
    {"name": "STORAGE_ALLOW_PATTERNS", "value": ""},
)
_ENVIRONMENT = st.lists(st.sampled_from(_VARIABLES), unique_by=lambda found: str(found["name"]))

_REST: dict[str, st.SearchStrategy[Any]] = {
    "affinity": _AFFINITY,
    "nodeSelector": st.just({PRODUCT: A100}),
    "tolerations": st.just([{"operator": "Exists"}]),
    "topologySpreadConstraints": st.just(
        [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}]
    ),
    "securityContext": st.sampled_from(
        [{}, {"fsGroup": 1000, "runAsUser": 1000}, {"seLinuxOptions": {"level": "s0:c1,c2"}}]
    ),
    "hostNetwork": st.booleans(),
    "shareProcessNamespace": st.booleans(),
    "schedulingGates": st.just([{"name": "example.com/later"}]),
    "imagePullSecrets": st.just([{"name": "registry"}]),
    "os": st.just({"name": "linux"}),
    "terminationGracePeriodSeconds": st.integers(0, 600),
}


@st.composite
def generated_pods(draw: st.DrawFn) -> Pod:
    """A pod of one of the three shapes, which the hook means to help where it can."""
    odd = [
        {"name": f"odd-{number}", **source}
        for number, source in enumerate(draw(st.lists(st.sampled_from(_VOLUMES), max_size=3)))
    ]
    names = [volume["name"] for volume in odd]
    make = draw(st.sampled_from([_wrapped, _rewritten, _named]))
    labels, notes, initializers, own, mounts = make(draw)
    volumes = draw(st.permutations([*odd, *own]))
    others = st.lists(_others(names, mounts), max_size=2)
    before, after = draw(others), draw(others)
    servers = [_some_server(draw, names, mounts), *draw(others)]
    spec = draw(_some({}, **_REST))
    spec["initContainers"] = _numbered("early", before) + initializers + _numbered("late", after)
    spec["containers"] = _numbered("server", servers)
    spec["volumes"] = volumes
    for name in ("initContainers", "volumes"):
        if not spec[name] and draw(st.booleans()):
            spec[name] = None
    metadata: Pod = {
        "namespace": "team-a",
        "creationTimestamp": None,
        "labels": draw(st.sampled_from([{"app": "x"}, {}])) | labels,
        "annotations": draw(_NOTES) | notes,
    }
    for name in ("labels", "annotations"):
        if not metadata[name] and draw(st.booleans()):
            metadata[name] = None
    return {"metadata": metadata, "spec": spec, "status": {}}


def _wrapped(draw: st.DrawFn) -> tuple[Any, ...]:
    uris = draw(st.lists(st.sampled_from([*CACHED, *_NO_CACHE]), min_size=1, unique=True))
    if not set(uris) & set(CACHED):
        uris.append(LLAMA)
    parent = draw(st.sampled_from(["/mnt/models", "/mnt", "/opt/it's/here"]))
    places = [f"{parent}/{number}" for number in range(len(uris))] if uris[1:] else [parent]
    mounts = [{"name": "models", "mountPath": parent}]
    initializer = draw(
        _some(
            {
                "name": "storage-initializer",
                "image": draw(st.sampled_from(["x/storage-initializer:v1", "storage-initializer"])),
                "args": [word for pair in zip(uris, places, strict=True) for word in pair],
                "volumeMounts": mounts,
            },
            env=_ENVIRONMENT,
            command=st.sampled_from([[], ["/entry point", "--x"]]),
            resources=st.just({}),
        )
    )
    return {}, {}, [initializer], [{"name": "models", "emptyDir": {}}], mounts


def _rewritten(draw: st.DrawFn) -> tuple[Any, ...]:
    uri = draw(st.sampled_from([BUCKET, f"{BUCKET}/"]))
    service = draw(st.sampled_from([BUCKET, f"{BUCKET}/llama/7b"]))
    prefix = "internal.serving.kserve.io"
    notes = {
        f"{prefix}/localmodel-pvc-name": "bucket-models-gpu1",
        f"{prefix}/localmodel-sourceuri": uri,
        f"{prefix}/storage-initializer-sourceuri": service,
    }
    part = f"models/{cache_key(uri)}/{service.removeprefix(uri)}"
    mounts = [{"name": KSERVE_CLAIM, "mountPath": "/mnt/models", "readOnly": True, "subPath": part}]
    claim = draw(_some({"claimName": "bucket-models-gpu1"}, readOnly=st.just(False)))
    volume = {"name": KSERVE_CLAIM, "persistentVolumeClaim": claim}
    return {KSERVE_LABEL: "bucket-models"}, notes, [], [volume], mounts


def _named(draw: st.DrawFn) -> tuple[Any, ...]:
    names = draw(st.lists(st.sampled_from(["", ".a", ".b-c"]), min_size=1, unique=True))
    notes = {}
    for number, name in enumerate(names):
        notes[f"localmodel-agent.io/source{name}"] = draw(st.sampled_from(CACHED))
        if number or draw(st.booleans()):
            place = draw(st.sampled_from(["/models", "/mnt/ü", "/mnt/a b", "/mnt/x/../y/"]))
            notes[f"localmodel-agent.io/mount-path{name}"] = f"{place}/{number}"
    return {}, notes, [], [], []


def _some_server(draw: st.DrawFn, volumes: list[str], mounts: list[Any]) -> dict[str, Any]:
    server = draw(_others(volumes, []))
    server |= {"resources": _GPU, "volumeMounts": [*(server.get("volumeMounts") or ()), *mounts]}
    return server


@st.composite
def _others(draw: st.DrawFn, volumes: list[str], mounts: list[Any]) -> dict[str, Any]:
    found = [
        draw(
            _some(
                {"name": name, "mountPath": f"/odd/{number}"},
                readOnly=st.booleans(),
                subPath=st.sampled_from(["", "a/b"]),
            )
        )
        for number, name in enumerate(volumes)
        if draw(st.booleans())
    ]
    seen = draw(st.sampled_from([[], mounts]))
    container = draw(
        _some(
            {"image": "busybox"},
            command=st.just(["sleep"]),
            args=st.lists(st.sampled_from(["-tp", "$(POD)"])),
            env=_ENVIRONMENT,
            resources=st.just({}),
            ports=st.just([]),
        )
    )
    if found or seen:
        container["volumeMounts"] = [*found, *seen]
    elif draw(st.booleans()):
        container["volumeMounts"] = None
    return container


def _numbered(kind: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": f"{kind}-{number}", **one} for number, one in enumerate(found)]


def _pod(*mounts: dict[str, Any], **notes: str) -> Pod:
    """One that names a model, and whose server mounts this besides."""
    pod = plain(**notes)
    for mount in mounts:
        pod["spec"]["containers"][0].setdefault("volumeMounts", []).append({"name": "x", **mount})
    return pod


def named_pods() -> dict[str, tuple[Pod, bool]]:
    """Valid pods whose wishes come close to what a pod may not have, whether each is helped."""
    block = _pod(source=LLAMA)
    claim = {"persistentVolumeClaim": {"claimName": "block"}}
    block["spec"]["volumes"].append({"name": "block", **claim})
    devices = [{"name": "block", "devicePath": "/mnt/models"}]
    block["spec"]["containers"][0]["volumeDevices"] = devices
    full, nearly = (
        _pod(**{"source": LLAMA, "other": "~" * (_FILLING - room)}) for room in (100, 400)
    )
    deep = golden("uncached-hf")
    deep["spec"]["initContainers"][0]["args"][0] = f"{BUCKET}/../elsewhere"
    return {
        "two models at one place": (_pod(**{"source": LLAMA, "source.x": BUCKET}), False),
        "a model in a model": (
            _pod(**{"source": LLAMA, "source.x": BUCKET, "mount-path.x": "/mnt/models/x"}),
            False,
        ),
        "a mount in the model": (_pod({"mountPath": "/mnt/models/lora"}, source=LLAMA), False),
        "the place is taken": (_pod({"mountPath": "/mnt//models/"}, source=LLAMA), False),
        "a device has the place": (block, False),
        "below what cannot be written": (
            _pod({"mountPath": "/mnt", "readOnly": True}, source=LLAMA),
            False,
        ),
        "below a directory of its own": (_pod({"mountPath": "/mnt"}, source=LLAMA), True),
        "out of the model": (_pod(source=f"{BUCKET}/../elsewhere"), False),
        "out of the model, downloaded": (deep, False),
        "a relative place": (_pod(source=LLAMA, mount_path="models"), False),
        "the root": (_pod(source=LLAMA, mount_path="/.."), False),
        "two slashes": (_pod(source=LLAMA, mount_path="//models"), True),
        "a colon": (_pod(source=LLAMA, mount_path="/a:b"), True),
        "no room for annotations": (full, False),
        "room for annotations": (nearly, True),
    }
