"""Pods as KServe, ModelMesh and kube-controller-manager would make them of tests/systems/*.yaml.

KServe's are the recorded ones (tests/hook/data), under the name and in the namespace of the service
that is asked for. `the_recorded` demands that this service is the recorded one, field by field;
what no service was recorded for is derived from the nearest pod, and its function says how.
"""

import copy
import json
from typing import Any

from tests.hook.pods import golden, recorded_service

Json = dict[str, Any]


def the_recorded(case: str, service: Json, **renamed: str) -> Json:
    """The pod of that service, which is the recorded one but for its name and namespace. `renamed`
    are other names that differ: of a node group, say."""
    assert service["spec"] == recorded_service(case)["spec"], f"not what was recorded as {case}"
    return _named_as(golden(case), case, service, renamed)


def of_uri(service: Json) -> Json:
    """Of a huggingface service that differs from the recorded one in its URI and annotations only.
    KServe copies `serving.kserve.io/nodegroup` to the pod (cached-nodegroup)."""
    case = "uncached-hf"
    wishes = copy.deepcopy(recorded_service(case)["spec"])
    uri = service["spec"]["predictor"]["model"]["storageUri"]
    renamed = {wishes["predictor"]["model"]["storageUri"]: uri}
    wishes["predictor"]["model"]["storageUri"] = uri
    assert service["spec"] == wishes
    pod = _named_as(golden(case), case, service, renamed)
    pod["metadata"]["annotations"] |= service["metadata"].get("annotations", {})
    return pod


def on_openshift(service: Json, *, uri: str) -> Json:
    """The recorded pod of a connection, and what the SCC restricted-v2 adds to it. OpenShift gives
    the ids from the range of the namespace; `uri` is what KServe made of bucket and path."""
    pod = the_recorded("storage-key", service)
    pod["metadata"]["annotations"]["openshift.io/scc"] = "restricted-v2"
    pod["spec"]["securityContext"] |= {"seccompProfile": {"type": "RuntimeDefault"}}
    for container in (*pod["spec"]["initContainers"], *pod["spec"]["containers"]):
        container["securityContext"] = {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "runAsUser": 1000680000,
        }
    pod["spec"]["initContainers"][0]["args"][0] = uri
    return pod


def of_triton(service: Json) -> Json:
    """The recorded Triton with the initializer of the recorded `storageUris`: the same image tag,
    arguments and places as this service has."""
    predictor = service["spec"]["predictor"]
    pod = _named_as(golden("triton-vllm"), "triton-vllm", service, {})
    both = golden("storage-uris")["spec"]
    (server,) = pod["spec"]["containers"]
    server["image"] = f"nvcr.io/nvidia/tritonserver:{predictor['triton']['runtimeVersion']}"
    server["args"] += predictor["triton"]["args"]
    server["volumeMounts"] = [
        m for m in both["containers"][0]["volumeMounts"] if "mnt" in m["name"]
    ]
    pod["spec"]["initContainers"] = both["initContainers"]
    pod["spec"]["volumes"] = [v for v in both["volumes"] if "mnt" in v["name"]]
    places = [(pair["uri"], pair["mountPath"]) for pair in predictor["storageUris"]]
    pod["spec"]["initContainers"][0]["args"] = [word for pair in places for word in pair]
    del pod["metadata"]["annotations"]["internal.serving.kserve.io/storage-initializer-sourceuri"]
    if limits := predictor["triton"]["resources"]:
        server["resources"] = limits
    return pod


def of_modelmesh(namespace: str, *claims: str, memory_mib: int = 1024) -> Json:
    """A runtime without a built-in adapter, as modelmesh-serving deploys it: `models-dir` is 1.5
    times the memory of the runtime (controllers/modelmesh/runtime.go), and the puller has every
    claim at /pvc_mounts (puller.go). Shortened by probes, ports and what has to do with etcd."""
    models = {"name": "models-dir", "mountPath": "/models"}
    limit = {"cpu": "5", "memory": f"{memory_mib}Mi"}
    mounts = [{"name": n, "mountPath": f"/pvc_mounts/{n}", "readOnly": True} for n in claims]
    volumes: list[Json] = [
        {"name": "models-dir", "emptyDir": {"sizeLimit": f"{memory_mib * 3 // 2}Mi"}},
        {"name": "storage-config", "secret": {"secretName": "storage-config"}},
        *({"name": name, "persistentVolumeClaim": {"claimName": name}} for name in claims),
    ]
    config = {"name": "storage-config", "mountPath": "/storage-config", "readOnly": True}
    arch = {"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64"]}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [arch]}]}
    return {
        "metadata": {
            "generateName": "modelmesh-serving-onnx-runtime-5d8c7b9f6d-",
            "namespace": namespace,
            "labels": {
                "app.kubernetes.io/managed-by": "modelmesh-controller",
                "modelmesh-service": "modelmesh-serving",
                "name": "modelmesh-serving-onnx-runtime",
                "pod-template-hash": "5d8c7b9f6d",
            },
        },
        "spec": {
            "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}},
            "containers": [
                {
                    "name": "onnx",
                    "image": "example.com/onnx-runtime:1",
                    "resources": {"limits": limit, "requests": limit},
                    "volumeMounts": [models, *mounts],
                },
                {
                    "name": "puller",
                    "image": "kserve/modelmesh-runtime-adapter:v0.12.0",
                    "env": [{"name": "ROOT_MODEL_DIR", "value": "/models"}],
                    "volumeMounts": [models, config, *mounts],
                },
                {"name": "mm", "image": "kserve/modelmesh:v0.12.0"},
            ],
            "volumes": volumes,
        },
    }


def of_deployment(deployment: Json) -> Json:
    """As its ReplicaSet makes it."""
    pod: Json = copy.deepcopy(deployment["spec"]["template"])
    name, suffix = deployment["metadata"]["name"], "6d4cf56db6"
    pod["metadata"]["labels"]["pod-template-hash"] = suffix
    pod["metadata"] |= {
        "generateName": f"{name}-{suffix}-",
        "namespace": deployment["metadata"]["namespace"],
    }
    return pod


def _named_as(pod: Json, case: str, service: Json, renamed: dict[str, str]) -> Json:
    metadata = service["metadata"]
    text = json.dumps(pod)
    for old, new in {case: metadata["name"], **renamed}.items():
        text = text.replace(old, new)
    found: Json = json.loads(text)
    found["metadata"]["namespace"] = metadata["namespace"]
    return found
