"""Which objects are read for a cache's credentials, what they come to, and that none is shown."""

import base64
import json
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agent.errors import AgentError, Reason
from agent.kube.credentials import (
    CONFIG_MAP,
    Ask,
    Credentials,
    Kind,
    Need,
    WebIdentity,
    ask,
    needs,
    resolve,
)
from agent.model import cache_key

JOBS = "kserve-localmodel-jobs"
CONFIG = Need(Kind.CONFIG_MAP, "kserve", CONFIG_MAP)
CONTAINERS = Need(Kind.STORAGE_CONTAINERS)
ACCOUNT = Need(Kind.SERVICE_ACCOUNT, JOBS, "downloader")
VECTORS = Path(__file__).parents[1] / "manifests" / "credentials"
S3_DEFAULTS = {  # of the ConfigMap in KServe's own tests
    "s3Endpoint": "s3.amazonaws.com",
    "s3UseHttps": "1",
    "s3Region": "us-east-2",
    "s3VerifySSL": "1",
    "s3UseVirtualBucket": "",
    "s3UseAnonymousCredential": "false",
    "s3CABundle": "",
}


def vectors(name: str) -> pytest.MarkDecorator:
    cases = yaml.safe_load((VECTORS / f"{name}.yaml").read_text())
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["case"])


def encoded(data: Mapping[str, str | bytes], **annotations: str) -> dict[str, Any]:
    return {
        "metadata": {"annotations": annotations},
        "data": {
            key: base64.b64encode(value.encode() if isinstance(value, str) else value).decode()
            for key, value in data.items()
        },
    }


def config_map(**sections: Any) -> dict[str, Any]:
    return {"data": {name: json.dumps(value) for name, value in sections.items()}}


def secret(name: str) -> Need:
    return Need(Kind.SECRET, JOBS, name)


def asking(**entry: Any) -> Ask:
    return ask({"sourceModelUri": "hf://o/m", **entry}, config_namespace="kserve")


def read(
    asked: Ask, answer: Callable[[Need], Any], limit: int = 20
) -> tuple[Credentials, list[list[Need]]]:
    """As the shell does: what is asked for, and nothing else."""
    objects: dict[Need, Any] = {}
    rounds: list[list[Need]] = []
    while wanted := needs(asked, objects):
        assert len(rounds) < limit
        assert not set(wanted) & set(objects)
        rounds.append(wanted)
        objects |= {need: answer(need) for need in wanted}
    return resolve(asked, objects), rounds


def outcome(case: Mapping[str, Any], asked: Ask, objects: Mapping[Need, Any]) -> Credentials | None:
    """Compares with what the case says; None where it is rightly refused."""
    if "refused" in case:
        with pytest.raises(AgentError) as refused:
            read(asked, objects.get)
        assert case["refused"] in refused.value.message
        assert refused.value.reason is Reason.UNAUTHORIZED  # which is tried again
        return None
    found, _ = read(asked, objects.get)
    assert found.environment == case["environment"]
    files = {path: content.decode() for path, content in found.files.items()}
    assert files == case.get("files", {})
    assert found.uri == case.get("reads", asked.uri)
    return found


# -- the vectors ----------------------------------------------------------------------------------


@vectors("s3_settings")
def test_9_1_11_settings_of_s3_from_the_annotation_the_secret_or_the_config_map(
    case: dict[str, Any],
) -> None:
    annotations = {
        f"serving.kserve.io/{key}": value for key, value in case.get("annotations", {}).items()
    }
    keys = {"awsAccessKeyID": "", "awsSecretAccessKey": ""}
    bundle = {"data": {"cabundle.crt": "PEM"}}
    objects = {
        CONFIG: config_map(credentials={"s3": case.get("s3", {})}),
        ACCOUNT: {"secrets": [{"name": "s3"}]},
        secret("s3"): encoded({**keys, **case.get("data", {})}, **annotations),
        Need(Kind.CONFIG_MAP, JOBS, "value-config"): bundle,
    }
    both = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    expected = {**case, "environment": both | case["environment"]}
    outcome(expected, asking(serviceAccountName="downloader"), objects)


@vectors("storage_spec")
def test_9_1_11_a_key_of_storage_config(case: dict[str, Any]) -> None:
    credentials = {
        "storageSpecSecretName": "storage-secret",
        "storageSecretNameAnnotation": "serving.kserve.io/storageSecretName",
        "s3": S3_DEFAULTS,
    }
    objects = {CONFIG: config_map(credentials=credentials)}
    if case["secret"] is not None:
        objects[secret(case.get("named", "storage-secret"))] = encoded(case["secret"])
    storage = {"key": case["key"], "parameters": case.get("parameters")}
    asked = asking(sourceModelUri=case.get("uri", "s3://test-bucket/models/"), storage=storage)
    if "named" in case:
        annotations = {"serving.kserve.io/storageSecretName": case["named"]}
        asked = replace(asked, annotations=annotations)
    outcome(case, asked, objects)


@vectors("service_account")
def test_9_1_11_the_secrets_of_a_service_account(case: dict[str, Any]) -> None:
    credentials = {"storageSecretNameAnnotation": "serving.kserve.io/storageSecretName"}
    objects: dict[Need, Any] = {CONFIG: config_map(credentials={**credentials, "s3": S3_DEFAULTS})}
    if (annotations := case.get("account", {})) is not None:
        listed = [{"name": item["name"]} for item in case.get("secrets", [])]
        objects[ACCOUNT] = {"metadata": {"annotations": annotations}, "secrets": listed}
    for item in [*case.get("secrets", []), *case.get("unlisted", [])]:
        if item["data"] is not None:
            found = encoded(item["data"], **item.get("annotations", {}))
            objects[secret(item["name"])] = found
    asked = Ask(
        uri="s3://b/m",
        config_namespace="kserve",
        service_account="downloader",
        annotations=case.get("annotations", {}),
    )
    credentials_found = outcome(case, asked, objects)
    if "role" in case:
        identity = WebIdentity(role=case["role"], namespace=JOBS, service_account="downloader")
        assert credentials_found is not None
        assert credentials_found.web_identity == identity


@vectors("storage_containers")
def test_9_1_11_and_12_the_environment_of_a_storage_container(case: dict[str, Any]) -> None:
    objects: dict[Need, Any] = {CONTAINERS: {"items": case["containers"]}}
    objects |= {secret(name): encoded(data) for name, data in case.get("secrets", {}).items()}
    for name, data in case.get("config_maps", {}).items():
        objects[Need(Kind.CONFIG_MAP, JOBS, name)] = {"data": data}
    uri = case.get("uri", "hf://meta-llama/Meta-Llama-3-8B")
    storage = {"storage": {"key": case["key"]}} if "key" in case else {}
    outcome(case, asking(sourceModelUri=uri, **storage), objects)


def test_9_1_5_a_uri_is_read_as_it_is_written() -> None:
    for uri, key in yaml.safe_load((VECTORS / "uris.yaml").read_text()).items():
        found, _ = read(asking(sourceModelUri=uri), lambda _: None)
        assert cache_key(found.uri) == key


# -- what is read ---------------------------------------------------------------------------------


def test_without_credentials_two_objects_are_read_and_may_be_absent() -> None:
    found, rounds = read(asking(), lambda _: None)
    assert rounds == [[CONFIG, CONTAINERS]]
    assert found == Credentials(uri="hf://o/m")
    assert not found.own
    assert repr(found) == "<Credentials from nowhere>"


def test_a_service_account_and_its_secrets_are_read_in_the_order_listed() -> None:
    objects = {
        ACCOUNT: {"secrets": [{"name": "b"}, {"name": "a"}, {"name": "b"}]},
        secret("a"): encoded({"HF_TOKEN": "hf_a"}),
        secret("b"): encoded({"other": "x"}),
    }
    found, rounds = read(asking(serviceAccountName="downloader"), objects.get)
    assert rounds == [[CONFIG, CONTAINERS], [ACCOUNT], [secret("b"), secret("a")]]
    assert found.own
    assert found.sources == (ACCOUNT, secret("b"), secret("a"))
    names = f"ServiceAccount {JOBS}/downloader, Secret {JOBS}/b, Secret {JOBS}/a"
    assert repr(found) == str(found) == f"<Credentials from {names}>"


def test_a_key_is_read_and_the_service_account_beside_it_is_not() -> None:
    objects = {secret("storage-config"): encoded({"k": '{"type": "s3"}'})}
    asked = asking(serviceAccountName="downloader", storage={"key": "k"})
    _, rounds = read(asked, objects.get)
    assert rounds == [[CONFIG, CONTAINERS], [secret("storage-config")]]


@pytest.mark.parametrize("storage", [{}, {"parameters": {"type": "s3"}}, {"key": None}])
def test_a_storage_without_a_key_means_the_default_service_account(storage: Any) -> None:
    found, rounds = read(asking(storage=storage), lambda _: None)
    default = Need(Kind.SERVICE_ACCOUNT, JOBS, "default")
    assert rounds[1:] == [[default]]
    assert found.own
    assert found.absent == (default,)
    assert read(asking(serviceAccountName="named", storage=storage), lambda _: None)[1][1:] == [
        [Need(Kind.SERVICE_ACCOUNT, JOBS, "named")]
    ]


def test_a_namespace_caches_credentials_are_the_job_namespaces_too() -> None:
    """As KServe's node agent looks them up (kserve.md 1.1, 3.4)."""
    _, rounds = read(asking(namespace="team-a", serviceAccountName="downloader"), lambda _: None)
    assert {need.namespace for wanted in rounds for need in wanted} == {"kserve", JOBS, ""}


def test_the_job_namespace_is_the_config_maps_unless_it_is_set() -> None:
    objects = {CONFIG: config_map(localModel={"jobNamespace": "jobs"})}
    entry = {"sourceModelUri": "hf://o/m", "serviceAccountName": "sa"}
    _, rounds = read(ask(entry, config_namespace="kserve"), objects.get)
    assert rounds[1] == [Need(Kind.SERVICE_ACCOUNT, "jobs", "sa")]
    _, rounds = read(ask(entry, config_namespace="kserve", job_namespace="mine"), objects.get)
    assert rounds[1] == [Need(Kind.SERVICE_ACCOUNT, "mine", "sa")]


def test_the_shipped_names_of_the_keys_of_s3() -> None:
    names = {
        "s3AccessKeyIDName": "AWS_ACCESS_KEY_ID",
        "s3SecretAccessKeyName": "AWS_SECRET_ACCESS_KEY",
    }
    objects = {
        CONFIG: config_map(credentials={"s3": names}),
        ACCOUNT: {"secrets": [{"name": "s3"}]},
        secret("s3"): encoded({"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}),
    }
    found, _ = read(asking(serviceAccountName="downloader"), objects.get)
    assert found.environment == {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}


def test_the_key_that_decides_what_a_secret_is_has_its_place_in_the_table() -> None:
    """kserve.md 5.2 (b): with each row's key taken away, the next row's decides."""
    table = [  # the key, and what of the result shows it
        ("awsSecretAccessKey", "AWS_SECRET_ACCESS_KEY"),
        ("gcloud-application-credentials.json", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("AZURE_CLIENT_ID", "AZURE_CLIENT_ID"),
        ("AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_ACCESS_KEY"),
        ("https-host", "value-headers"),
        ("HDFS_NAMENODE", "/var/secrets/kserve-hdfscreds/HDFS_NAMENODE"),
        ("HF_TOKEN", "HF_TOKEN"),
        ("MODELSCOPE_API_TOKEN", "MODELSCOPE_API_TOKEN"),
    ]
    data = {"awsAccessKeyID": "value", "headers": "value"} | {key: "value" for key, _ in table}
    names = {name for _, name in table}
    for position, (key, name) in enumerate(table):
        objects = {ACCOUNT: {"secrets": [{"name": "a"}]}, secret("a"): encoded(data)}
        found, _ = read(asking(serviceAccountName="downloader"), objects.get)
        shown_by = names & {*found.environment, *found.files}
        azure = {"AZURE_CLIENT_ID", "AZURE_STORAGE_ACCESS_KEY"}  # the first has the second too
        assert shown_by == (azure if name == "AZURE_CLIENT_ID" else {name}), position
        del data[key]


def test_a_secret_that_is_made_later_heals() -> None:
    asked = asking(storage={"key": "k"})
    objects: dict[Need, Any] = {}
    with pytest.raises(AgentError):
        read(asked, objects.get)
    objects[secret("storage-config")] = encoded({"k": '{"type": "hf", "token": "hf_abc"}'})
    assert read(asked, objects.get)[0].environment == {"HF_TOKEN": "hf_abc"}


def test_to_resolve_before_everything_is_read_is_a_mistake() -> None:
    with pytest.raises(LookupError, match=f"ConfigMap kserve/{CONFIG_MAP}, Cluster"):
        resolve(asking(), {})


# -- a CA bundle ----------------------------------------------------------------------------------


def bundled(entry: dict[str, str], **config_maps: dict[str, str]) -> str:
    objects: dict[Need, Any] = {
        CONFIG: config_map(storageInitializer={"caBundleConfigMapName": "cluster-wide"}),
        secret("storage-config"): encoded({"k": json.dumps({"type": "s3", **entry})}),
    }
    for name, data in config_maps.items():
        namespace = "kserve" if name == "wide" else JOBS
        full = "cluster-wide" if name == "wide" else name
        objects[Need(Kind.CONFIG_MAP, namespace, full)] = {"data": data}
    return read(asking(storage={"key": "k"}), objects.get)[0].ca_bundle


def test_9_1_10_the_ca_bundle() -> None:
    mine, wide = {"cabundle.crt": "MINE", "other.crt": "OTHER"}, {"cabundle.crt": "WIDE"}
    assert bundled({}) == ""
    assert bundled({}, wide=wide) == "WIDE"
    assert bundled({}, wide={"else": "x"}) == ""
    assert bundled({"cabundle_configmap": "mine"}, mine=mine, wide=wide) == "MINE"
    path = {"cabundle_configmap": "mine", "ca_bundle": "/certs/other.crt"}
    assert bundled(path, mine=mine) == "OTHER"
    assert bundled({"certificate": "PEM"}, wide=wide) == "PEM"
    assert bundled({"certificate": "PEM", "verify_ssl": "False"}) == ""
    assert bundled({"cabundle_configmap": "gone", "verify_ssl": "0"}) == ""


@pytest.mark.parametrize("config_maps", [{}, {"mine": {"else": "x"}}])
def test_a_ca_bundle_that_the_credentials_name_must_be_there(config_maps: Any) -> None:
    with pytest.raises(AgentError, match=f"ConfigMap {JOBS}/mine"):
        bundled({"cabundle_configmap": "mine"}, **config_maps)


# -- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"serviceAccountName": 7}, "serviceAccountName is not a text"),
        ({"serviceAccountName": "../secrets/x"}, "serviceAccountName is not the name"),
        ({"storage": []}, "storage is not an object"),
        ({"storage": {"key": 7}}, "key is not a text"),
        ({"storage": {"key": "k", "parameters": {"a": 1}}}, "storage.parameters is not an object"),
    ],
)
def test_a_spec_that_says_nothing_is_invalid(entry: Any, words: str) -> None:
    with pytest.raises(AgentError, match=words) as refused:
        asking(**entry)
    assert refused.value.reason is Reason.INVALID_SPEC


def test_the_parameters_of_a_cache_are_not_shown() -> None:
    asked = asking(storage={"key": "k", "parameters": {"secret_access_key": "LEAK"}})
    assert "LEAK" not in repr(asked)


Answer = TypeVar("Answer")
LEAK = "LEAK_"
KEYS = [
    *("awsAccessKeyID", "awsSecretAccessKey", "gcloud-application-credentials.json"),
    *("AZ_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_STORAGE_ACCESS_KEY", "HF_TOKEN", "HDFS_NAMENODE"),
    *("https-host", "headers", "S3_ENDPOINT", "S3_VERIFY_SSL", "AWS_CA_BUNDLE_CONFIGMAP"),
    *("k", "default", "default_s3", "cabundle.crt", "token"),
]
ENTRY_KEYS = [
    *("type", "token", "access_key_id", "endpoint_url", "cabundle_configmap", "certificate"),
    *("verify_ssl", "bucket", "TLS_KEY", "HDFS_NAMENODE"),
]
leaks = st.text(max_size=8).map(lambda text: LEAK + text)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | leaks,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(leaks, inner, max_size=3),
    max_leaves=6,
)
entries = st.dictionaries(
    st.sampled_from(ENTRY_KEYS),
    st.sampled_from(["s3", "hf", "hdfs", "gs", "0", ""]) | leaks | anything,
    max_size=5,
)
datum = st.one_of(
    entries.map(json.dumps).map(str.encode),
    leaks.map(lambda text: text.encode(errors="ignore")),
    st.binary(max_size=4).map(lambda tail: LEAK.encode() + tail),
    st.just(b'{"type": "s3", "access_key_id": "LEAK_"'),
).map(lambda raw: base64.b64encode(raw).decode())
annotations = st.dictionaries(
    st.sampled_from(
        [
            "eks.amazonaws.com/role-arn",
            "serving.kserve.io/s3-endpoint",
            "serving.kserve.io/s3-cabundle-configmap",
        ]
    ),
    leaks | anything,
    max_size=2,
)
metadata = st.fixed_dictionaries({"annotations": annotations})
secrets = st.fixed_dictionaries(
    {
        "metadata": metadata | anything,
        "data": st.dictionaries(st.sampled_from(KEYS), datum | leaks | anything, max_size=5),
    }
)
accounts = st.fixed_dictionaries(
    {
        "metadata": metadata | anything,
        "secrets": st.lists(
            st.fixed_dictionaries({"name": st.sampled_from(["a", "b"]) | leaks}) | anything,
            max_size=3,
        ),
    }
)
references = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "b"]) | leaks, "key": st.sampled_from(KEYS)},
    optional={"optional": st.booleans()},
)
variables = st.fixed_dictionaries(
    {"name": st.sampled_from(["HF_TOKEN", "STORAGE_CONFIG", "S3_VERIFY_SSL"]) | anything},
    optional={
        "value": entries.map(json.dumps) | leaks | st.just("$(HF_TOKEN)$$"),
        "valueFrom": st.dictionaries(
            st.sampled_from(["secretKeyRef", "configMapKeyRef", "fieldRef"]), references, max_size=1
        ),
    },
)
containers = st.fixed_dictionaries(
    {
        "metadata": st.just({"name": "c"}) | anything,
        "spec": st.fixed_dictionaries(
            {
                "workloadType": st.just("localModelDownloadJob"),
                "supportedUriFormats": st.lists(
                    st.sampled_from([{"prefix": "hf://"}, {"regex": "o/m$"}, {"regex": "("}, {}]),
                    max_size=2,
                ),
                "container": st.fixed_dictionaries(
                    {
                        "env": st.lists(variables, max_size=3) | anything,
                        "envFrom": st.lists(
                            st.dictionaries(
                                st.sampled_from(["secretRef", "configMapRef"]), references
                            ),
                            max_size=2,
                        ),
                    }
                )
                | anything,
            }
        )
        | anything,
    }
)
sections = st.fixed_dictionaries(
    {},
    optional={
        "credentials": st.dictionaries(
            st.sampled_from(["s3", "gcs", "storageSpecSecretName"]),
            anything | st.dictionaries(st.sampled_from(["s3Region", "s3CABundle"]), leaks),
            max_size=2,
        ),
        "storageInitializer": st.dictionaries(
            st.just("caBundleConfigMapName"), st.just("wide") | anything
        ),
    },
)
config_maps = st.builds(lambda found: config_map(**found), sections) | st.fixed_dictionaries(
    {"data": st.dictionaries(st.sampled_from(["credentials", "localModel", *KEYS]), anything)}
)
SHAPES: Mapping[Kind, Any] = {
    Kind.CONFIG_MAP: config_maps,
    Kind.SECRET: secrets,
    Kind.SERVICE_ACCOUNT: accounts,
    Kind.STORAGE_CONTAINERS: st.fixed_dictionaries({"items": st.lists(containers, max_size=2)}),
}
asks = st.builds(
    Ask,
    uri=st.sampled_from(["hf://o/m", "s3://b/m", "<scheme-placeholder>://m"]),
    config_namespace=st.just("kserve"),
    service_account=st.sampled_from(["", "downloader"]),
    storage_key=st.sampled_from([None, None, "", "k"]),
    parameters=st.dictionaries(
        st.sampled_from(["type", "bucket", "region"]), st.sampled_from(["s3", "hf", ""]) | leaks
    ),
)


def caught(what: Callable[[], Answer]) -> Answer | AgentError:
    try:
        return what()
    except AgentError as error:
        return error


def shown(error: BaseException) -> str:
    """All that a log could say of it."""
    return f"{error} {error!r} {''.join(traceback.format_exception(error, chain=True))}"


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(asks, st.data())
def test_any_objects_are_resolved_or_refused_and_no_value_is_shown(
    asked: Ask, data: st.DataObject
) -> None:
    def answer(need: Need) -> Any:
        shape = SHAPES[need.kind]
        return data.draw(st.one_of(st.none(), shape, shape, shape, anything), label=str(need))

    result = caught(lambda: read(asked, answer))
    if isinstance(result, AgentError):
        assert result.reason is Reason.UNAUTHORIZED
        assert result.message.isprintable()
        assert LEAK not in shown(result)
        assert isinstance(result.__context__, re.error | None)  # it holds a pattern, no secret
        return
    found, rounds = result
    assert LEAK not in f"{found} {found!r} {rounds}"
    assert all(isinstance(value, str) for value in found.environment.values())
    assert all(isinstance(content, bytes) for content in found.files.values())
    assert isinstance(found.ca_bundle, str)


@given(anything, anything)
@example({"key": "k", "parameters": {"LEAK_": 1}}, "LEAK_ / ../")
def test_any_entry_is_an_ask_or_invalid(storage: Any, account: Any) -> None:
    result = caught(lambda: asking(storage=storage, serviceAccountName=account))
    if isinstance(result, AgentError):
        assert result.reason is Reason.INVALID_SPEC
        assert LEAK not in shown(result)
    else:
        assert isinstance(result.service_account, str)


def test_deep_json_is_refused() -> None:
    objects = {secret("storage-config"): encoded({"k": "[" * 100_000})}
    with pytest.raises(AgentError, match="key 'k': it is not a JSON object"):
        read(asking(storage={"key": "k"}), objects.get)
