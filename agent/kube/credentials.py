"""Which objects hold the credentials of a cache, and what they come to (kserve.md 5.2, 9.1.10-12).

Nothing is read here. `needs` says which objects must be read next, each by its exact name, until
it says none; `resolve` then answers from what was read. Both walk the same rules (`_steps`), so
what is used and what is asked for cannot differ:

    asked = ask(entry, config_namespace="kserve")
    while wanted := needs(asked, objects):
        objects |= {need: <the object, or None if there is none> for need in wanted}
    credentials = resolve(asked, objects)

The result is what KServe's download container would have had: an environment, a few files, a CA
bundle. A value that came from a Secret is in no message, no `repr`, and no exception behind one (a
decoder's error holds the text it failed at, so nothing is raised while one is handled). Whatever is
wrong with an object is `Unauthorized`, which is tried again: somebody may create or mend it (issue
6). The same object can be read for many caches; nothing is kept here.
"""

import base64
import json
import posixpath
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from agent.errors import AgentError, Reason

CONFIG_MAP = "inferenceservice-config"
DEFAULT_JOB_NAMESPACE = "kserve-localmodel-jobs"  # what KServe ships (kserve.md 2.2)

_ANNOTATION = "serving.kserve.io/"
_ROLE = "eks.amazonaws.com/role-arn"
_DOWNLOADS = "localModelDownloadJob"  # the workloadType that is about us (kserve.md 1.5)
_PLACEHOLDER = "<scheme-placeholder>://"
_GCS_DIRECTORY = "/var/secrets/"
_HDFS_DIRECTORY = "/var/secrets/kserve-hdfscreds/"
_CA_KEY = "cabundle.crt"
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")  # RFC 1123 subdomain
_SURROGATE = re.compile("[\ud800-\udfff]")
_REFERENCE = re.compile(r"\$\$|\$\(([^)]*)\)")  # Kubernetes' own, in a container's env

# kserve.md 5.2.1: annotation, variable and key of the secret, key of the ConfigMap's credentials.s3
_S3_SETTINGS = (
    ("s3-usehttps", "S3_USE_HTTPS", "s3UseHttps"),
    ("s3-endpoint", "S3_ENDPOINT", "s3Endpoint"),
    ("s3-verifyssl", "S3_VERIFY_SSL", "s3VerifySSL"),
    ("s3-useanoncredential", "awsAnonymousCredential", "s3UseAnonymousCredential"),
    ("s3-region", "AWS_DEFAULT_REGION", "s3Region"),
    ("s3-usevirtualbucket", "S3_USER_VIRTUAL_BUCKET", "s3UseVirtualBucket"),
    ("s3-useaccelerate", "S3_USE_ACCELERATE", "s3UseAccelerate"),
    ("s3-cabundle", "AWS_CA_BUNDLE", "s3CABundle"),
    ("s3-cabundle-configmap", "AWS_CA_BUNDLE_CONFIGMAP", "s3CABundleConfigMap"),
)

# kserve.md 5.2 (a): an entry of storage-config, by its type. `hf` KServe documents and refuses.
# No endpoint for `hf`: parameters override the entry, and would send its token anywhere.
_SPEC_VARIABLES: Mapping[str, Mapping[str, str]] = {
    "s3": {
        "endpoint_url": "AWS_ENDPOINT_URL",
        "access_key_id": "AWS_ACCESS_KEY_ID",
        "secret_access_key": "AWS_SECRET_ACCESS_KEY",
        "region": "AWS_DEFAULT_REGION",
        "ca_bundle": "AWS_CA_BUNDLE",
        "cabundle_configmap": "AWS_CA_BUNDLE_CONFIGMAP",
        "verify_ssl": "S3_VERIFY_SSL",
        "anonymous": "awsAnonymousCredential",
    },
    "hdfs": {},
    "webhdfs": {},
    "hf": {"token": "HF_TOKEN"},
}
_HDFS_KEYS = (
    *("HDFS_NAMENODE", "USER_PROXY", "HDFS_ROOTPATH", "TLS_CERT", "TLS_KEY", "TLS_CA"),
    *("TLS_SKIP_VERIFY", "HEADERS", "N_THREADS", "KERBEROS_KEYTAB", "KERBEROS_PRINCIPAL"),
)
_HDFS_BASE64 = frozenset({"KERBEROS_KEYTAB", "TLS_CERT", "TLS_KEY", "TLS_CA"})
_AZURE = (
    *("AZURE_SUBSCRIPTION_ID", "AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET"),
    *("AZURE_STORAGE_ACCESS_KEY", "AZURE_ACCESS_TOKEN", "AZURE_ACCESS_EXPIRES_ON_SECONDS"),
    *("AZURE_ACCOUNT_NAME", "AZURE_SERVICE_URL"),
)
_AZURE_LEGACY = {name: name.replace("AZURE_", "AZ_") for name in _AZURE[:4]}


class Kind(StrEnum):
    """What is read. All but the last by name; that one is listed, for any of them may match."""

    CONFIG_MAP = "ConfigMap"
    SERVICE_ACCOUNT = "ServiceAccount"
    SECRET = "Secret"
    STORAGE_CONTAINERS = "ClusterStorageContainers"


@dataclass(frozen=True, slots=True)
class Need:
    """One object to read; for STORAGE_CONTAINERS the list, as the API server answers it."""

    kind: Kind
    namespace: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.name else str(self.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What one cache says of its credentials, and where they are looked up.

    An empty `service_account` and no `storage_key`: it names none. An empty `storage_key` is not
    none: KServe then looks for `default` or `default_<type>`. `job_namespace` wins over the
    ConfigMap's. `annotations` may name another secret; KServe's agent gives none of a cache.
    """

    uri: str
    config_namespace: str
    job_namespace: str = ""
    service_account: str = ""
    storage_key: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict, repr=False)
    annotations: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class WebIdentity:
    """An AWS role that this ServiceAccount may assume with a token of its own (IRSA).

    KServe's Jobs never did (kserve.md 3.4). Static keys beside it win, as in AWS's own order.
    """

    role: str
    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Credentials:
    """What a source may use for one cache. `repr` says where it is from, and nothing of it.

    `uri` is what to read: the cache's own, but where it has a placeholder for a scheme.
    `environment` has KServe's names; an empty value is as good as none. `files` are those that a
    variable names, by their path in KServe's container. `ca_bundle` is PEM, to be trusted beside
    the machine's own; where it is given, `AWS_CA_BUNDLE` (a path in that container) says nothing.
    `own`: the cache itself names credentials, found or not, so that nobody else's may stand in for
    them, and they must be proven before it is ready (design D12). `absent` are the account and the
    secrets that were named and are not there, which KServe bears: worth telling who is then refused
    by the source.
    """

    uri: str
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    ca_bundle: str = ""
    web_identity: WebIdentity | None = None
    own: bool = False
    sources: tuple[Need, ...] = ()
    absent: tuple[Need, ...] = ()

    def __repr__(self) -> str:
        return f"<Credentials from {', '.join(map(str, self.sources)) or 'nowhere'}>"


_Steps = Generator[tuple[Need, ...], tuple[Any, ...], Any]


def ask(entry: Mapping[str, Any], *, config_namespace: str, job_namespace: str = "") -> Ask:
    """From an entry of a LocalModelNode, or the spec of a cache: both have the same fields.

    Raises InvalidSpec naming the field.
    """
    account = _field(entry, "serviceAccountName")
    storage = entry.get("storage")
    if storage is not None and not isinstance(storage, Mapping):
        raise _invalid("storage is not an object")
    key = None if storage is None or storage.get("key") is None else _field(storage, "key")
    if storage is not None and key is None and not account:
        account = "default"  # parameters without a key are not read (kserve.md 3.4)
    if account and not _NAME.fullmatch(account):
        raise _invalid("serviceAccountName is not the name of a ServiceAccount")
    parameters = (storage or {}).get("parameters") or {}
    if not _is_texts(parameters):
        raise _invalid("storage.parameters is not an object of texts")
    return Ask(
        uri=_field(entry, "sourceModelUri"),
        config_namespace=config_namespace,
        job_namespace=job_namespace,
        service_account=account,
        storage_key=key,
        parameters=parameters,
    )


def needs(asked: Ask, objects: Mapping[Need, Any]) -> list[Need]:
    """What must be read now, beyond what was. Nothing: `resolve` can answer. Raises AgentError."""
    return _walk(asked, objects)[0]


def resolve(asked: Ask, objects: Mapping[Need, Any]) -> Credentials:
    """From the objects that `needs` asked for, None for one that does not exist.

    Raises Unauthorized naming the object and its key, never what is in it.
    """
    missing, found = _walk(asked, objects)
    if found is None:
        raise LookupError(f"not read yet: {', '.join(map(str, missing))}")
    return found


def _walk(asked: Ask, objects: Mapping[Need, Any]) -> tuple[list[Need], Credentials | None]:
    steps = _steps(asked)
    read: dict[Need, bool] = {}  # and whether it is there
    try:
        wanted = next(steps)
        while True:
            if missing := [need for need in dict.fromkeys(wanted) if need not in objects]:
                return missing, None
            read |= {need: objects[need] is not None for need in wanted}
            wanted = steps.send(tuple(objects[need] for need in wanted))
    except StopIteration as done:
        result: Credentials = done.value
    named = {need: there for need, there in read.items() if need.name not in ("", CONFIG_MAP)}
    return [], replace(
        result,
        sources=tuple(need for need, there in named.items() if there),
        absent=tuple(
            need for need, there in named.items() if not there and need.kind is not Kind.CONFIG_MAP
        ),
    )


def _steps(asked: Ask) -> _Steps:
    """The rules, in their order. The container's variables win (kserve.md 9.1.11)."""
    config_need = _need(Kind.CONFIG_MAP, asked.config_namespace, CONFIG_MAP)
    containers_need = Need(Kind.STORAGE_CONTAINERS)
    raw_config, raw_containers = yield config_need, containers_need
    config = _config(config_need, raw_config, asked)
    uri, inline = yield from _inline(asked, config)
    container = yield from _container(asked.uri, raw_containers, config.job_namespace)
    found = container.over(inline)
    bundle = yield from _ca_bundle(found, config)
    return Credentials(
        uri=uri,
        environment=found.environment,
        files=found.files,
        ca_bundle=bundle,
        web_identity=found.web_identity,
        own=asked.storage_key is not None or bool(asked.service_account),
    )


def _inline(asked: Ask, config: "_Config") -> _Steps:
    """What the cache itself names: a key of storage-config, else a ServiceAccount, never both."""
    if asked.storage_key is not None:
        return (yield from _storage_spec(asked, config))
    if asked.service_account:
        return asked.uri, (yield from _service_account(asked, config))
    return asked.uri, _Part()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Credentials in the making."""

    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    certificate: str = field(default="", repr=False)
    web_identity: WebIdentity | None = None

    def over(self, lower: "_Part") -> "_Part":
        return _Part(
            environment={**lower.environment, **self.environment},
            files={**lower.files, **self.files},
            certificate=self.certificate or lower.certificate,
            web_identity=self.web_identity or lower.web_identity,
        )


# -- the ConfigMap --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Config:
    """What KServe's ConfigMap says of credentials; its code's defaults where it says nothing."""

    namespace: str
    job_namespace: str
    secret_name: str
    secret_annotation: str
    s3: Mapping[str, str]
    gcs_file: str
    ca_config_map: str


def _config(need: Need, raw: Any, asked: Ask) -> _Config:
    data = _mapping(need, {} if raw is None else raw, "data")
    section = {
        name: _json(f"{need}, key {name}", data[name]) if name in data else {}
        for name in ("credentials", "localModel", "storageInitializer")
    }
    credentials = section["credentials"]
    s3 = _mapping(need, section, "credentials", "s3")
    gcs = _mapping(need, section, "credentials", "gcs")

    def text(values: Mapping[str, Any], name: str, default: str = "") -> str:
        return _text(need, values, name) or default

    s3_names = ("s3AccessKeyIDName", "s3SecretAccessKeyName", *(row[2] for row in _S3_SETTINGS))
    return _Config(
        namespace=asked.config_namespace,
        job_namespace=asked.job_namespace
        or text(section["localModel"], "jobNamespace", DEFAULT_JOB_NAMESPACE),
        secret_name=text(credentials, "storageSpecSecretName", "storage-config"),
        secret_annotation=text(credentials, "storageSecretNameAnnotation"),
        s3={name: text(s3, name) for name in s3_names},
        gcs_file=text(gcs, "gcsCredentialFileName", "gcloud-application-credentials.json"),
        ca_config_map=text(section["storageInitializer"], "caBundleConfigMapName"),
    )


# -- storage.key: an entry of the secret storage-config (kserve.md 5.2 a) -------------------------


def _storage_spec(asked: Ask, config: _Config) -> _Steps:
    name = asked.annotations.get(config.secret_annotation) or config.secret_name
    need = _need(Kind.SECRET, config.job_namespace, name)
    (raw,) = yield (need,)
    kind = asked.parameters.get("type", "")
    key = asked.storage_key or (f"default_{kind}" if kind else "default")
    where = f"{need}, key {key[:100]!a}"
    entry: Mapping[str, str] = {}
    if raw is None:
        if asked.storage_key:
            raise _refused(f"{where}: the secret is missing")
    else:
        secret = _secret(need, raw)
        if key in secret.data:
            entry = _json_texts(where, secret.text(key))
        elif asked.storage_key:
            raise _refused(f"{where}: the secret has no such key")
    kind = kind or entry.get("type", "")
    if not kind:
        raise _refused(f"{where}: neither it nor storage.parameters says a type")
    if not asked.parameters.get("type") and kind not in _SPEC_VARIABLES:
        raise _refused(f"{where}: its type is none of {', '.join(_SPEC_VARIABLES)}")
    return _real_uri(where, asked, kind, entry), _spec(where, kind, {**entry, **asked.parameters})


def _spec(where: str, kind: str, entry: Mapping[str, str]) -> _Part:
    """What the initializer does with STORAGE_CONFIG, overridden by STORAGE_OVERRIDE_CONFIG."""
    if kind == "hf" and not entry.get("token"):
        raise _refused(f"{where}: an entry of type hf needs a token")
    variables = _SPEC_VARIABLES.get(kind, {})
    environment = {variables[key]: entry[key] for key in variables if key in entry}
    files = {}
    if kind in ("hdfs", "webhdfs"):
        for key in (key for key in _HDFS_KEYS if key in entry):
            encoded = key in _HDFS_BASE64
            content = _base64(f"{where}, {key}", entry[key]) if encoded else entry[key].encode()
            files[_HDFS_DIRECTORY + key] = content
    certificate = entry.get("certificate", "") if kind == "s3" else ""  # as ModelMesh has it
    return _Part(environment=_clean(environment), files=files, certificate=certificate)


def _real_uri(where: str, asked: Ask, kind: str, entry: Mapping[str, str]) -> str:
    """`<scheme-placeholder>://path` takes its scheme, and for S3 its bucket, from the entry."""
    if not asked.uri.startswith(_PLACEHOLDER):
        return asked.uri
    path = asked.uri.removeprefix(_PLACEHOLDER)
    if kind != "s3":
        return f"{kind}://{path}"
    named = (asked.parameters.get("bucket"), entry.get("bucket"), entry.get("default_bucket"))
    bucket = next(filter(None, named), None)
    if bucket is None:
        raise _refused(f"{where}: neither it nor storage.parameters names a bucket")
    return f"s3://{bucket}/{path}"


# -- serviceAccountName: the secrets of a ServiceAccount (kserve.md 5.2 b) ------------------------


def _service_account(asked: Ask, config: _Config) -> _Steps:
    """A ServiceAccount that is missing is no error (kserve-observed.md 6); a secret of it is."""
    need = _need(Kind.SERVICE_ACCOUNT, config.job_namespace, asked.service_account)
    (raw,) = yield (need,)
    if raw is None:
        return _Part()
    annotations = _mapping(need, raw, "metadata", "annotations")
    found = _Part()
    if _ROLE in annotations:
        role = _text(need, annotations, _ROLE)
        identity = WebIdentity(role=role, namespace=need.namespace, service_account=need.name)
        settings = _s3_settings(need, annotations, {}, config)
        found = _Part(environment=settings, web_identity=identity if role else None)
    other = asked.annotations.get(config.secret_annotation)
    names = [other] if other else _secret_names(need, raw)
    wanted = tuple(_need(Kind.SECRET, need.namespace, name) for name in names)
    seen: set[str] = set()
    for secret_need, raw_secret in zip(wanted, (yield wanted) if wanted else (), strict=True):
        if raw_secret is None:
            raise _refused(f"{secret_need} is missing; {need} names it")
        purpose, part = _classified(_secret(secret_need, raw_secret), config)
        if purpose not in seen:  # of two for the same purpose, the first that is listed
            found = part.over(found)
        seen.add(purpose)
    return found


def _secret_names(need: Need, raw: Mapping[str, Any]) -> Iterator[str]:
    listed = raw.get("secrets") or []
    if not isinstance(listed, list):
        raise _refused(f"{need}: secrets is not a list")
    for item in listed:
        yield _text(need, _mapping(need, {"secrets": item}, "secrets"), "name")


def _classified(secret: "_Secret", config: _Config) -> tuple[str, _Part]:
    """By the first of these keys that it has (the table of kserve.md 5.2 b), and no other."""
    if (config.s3["s3SecretAccessKeyName"] or "awsSecretAccessKey") in secret.data:
        return "s3", _s3(secret, config)
    if config.gcs_file in secret.data:
        path = _GCS_DIRECTORY + config.gcs_file
        content = secret.content(config.gcs_file)
        environment = {"GOOGLE_APPLICATION_CREDENTIALS": path}
        return "gcs", _Part(environment=environment, files={path: content})
    if not {"AZ_CLIENT_ID", "AZURE_CLIENT_ID", "AZURE_ACCESS_TOKEN"}.isdisjoint(secret.data):
        return "azure", _Part(environment=dict(_azure(secret)))
    if (key := "AZURE_STORAGE_ACCESS_KEY") in secret.data:
        return key, _Part(environment={key: secret.text(key)})
    if "https-host" in secret.data:
        return _https(secret)
    if "HDFS_NAMENODE" in secret.data:
        keys = [key for key in _HDFS_KEYS if key in secret.data]
        return "hdfs", _Part(files={_HDFS_DIRECTORY + key: secret.content(key) for key in keys})
    for key in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        if key in secret.data:
            return key, _Part(environment=_clean({key: secret.text(key)}))
    return "", _Part()


def _s3(secret: "_Secret", config: _Config) -> _Part:
    keys = {
        "AWS_ACCESS_KEY_ID": config.s3["s3AccessKeyIDName"] or "awsAccessKeyID",
        "AWS_SECRET_ACCESS_KEY": config.s3["s3SecretAccessKeyName"] or "awsSecretAccessKey",
    }
    environment = {variable: secret.text(key) for variable, key in keys.items()}
    data = {name: secret.text(name) for _, name, _ in _S3_SETTINGS if name in secret.data}
    return _Part(
        environment=environment | _s3_settings(secret.need, secret.annotations, data, config)
    )


def _s3_settings(
    need: Need, annotations: Mapping[str, Any], data: Mapping[str, str], config: _Config
) -> dict[str, str]:
    """Each from the annotation, else the secret's data, else the ConfigMap (kserve.md 5.2.1).

    One that is there and empty is taken: it keeps the next from being asked.
    """
    found = {}
    for suffix, variable, key in _S3_SETTINGS:
        if _ANNOTATION + suffix in annotations:
            found[variable] = _text(need, annotations, _ANNOTATION + suffix)
        else:
            found[variable] = data.get(variable, config.s3[key])
    for prefix, flag in (("https://", "1"), ("http://", "0")):
        if found["S3_ENDPOINT"].startswith(prefix):
            found["S3_ENDPOINT"] = found["S3_ENDPOINT"].removeprefix(prefix)
            found["S3_USE_HTTPS"] = flag
            break
    if endpoint := found["S3_ENDPOINT"]:
        scheme = "http" if found["S3_USE_HTTPS"] == "0" else "https"
        found["AWS_ENDPOINT_URL"] = f"{scheme}://{endpoint}"
    return {variable: value for variable, value in found.items() if value}


def _azure(secret: "_Secret") -> Iterator[tuple[str, str]]:
    for variable in _AZURE:
        for key in (_AZURE_LEGACY.get(variable, variable), variable):
            if key in secret.data:
                yield variable, secret.text(key)
                break


def _https(secret: "_Secret") -> tuple[str, _Part]:
    """Headers for one host: several of these do not exclude each other."""
    host = secret.text("https-host")
    if "headers" not in secret.data:
        return f"https {host}", _Part()
    return f"https {host}", _Part(environment={f"{host}-headers": secret.text("headers")})


# -- ClusterStorageContainer (kserve.md 1.5, 3.4, 9.1.11) -----------------------------------------


def _container(uri: str, raw: Any, namespace: str) -> _Steps:
    """The environment of the first that is for downloads and supports the URI."""
    need = Need(Kind.STORAGE_CONTAINERS)
    items = {} if raw is None else _mapping(need, {"answer": raw}, "answer")
    for item in _objects(need, items, "items"):
        name = _text(need, _mapping(need, item, "metadata"), "name")
        where = f"ClusterStorageContainer {name if _NAME.fullmatch(name) else '?'}"
        spec = _mapping(where, item, "spec")
        if item.get("disabled") is True or spec.get("workloadType") != _DOWNLOADS:
            continue
        if _supports(where, spec, uri):
            container = _mapping(where, spec, "container")
            environment = yield from _container_environment(where, container, namespace)
            return _applied(where, environment)
    return _Part()


def _supports(where: str, spec: Mapping[str, Any], uri: str) -> bool:
    """By a prefix, else by a regular expression that matches anywhere."""
    for entry in _objects(where, spec, "supportedUriFormats"):
        if prefix := _text(where, entry, "prefix"):
            if uri.startswith(prefix):
                return True
        elif pattern := _text(where, entry, "regex"):
            try:
                if re.search(pattern, uri):
                    return True
            except (re.error, OverflowError, RecursionError) as error:
                message = f"{where}: a regex of its supportedUriFormats is none that we can read"
                raise _refused(message) from error
    return False


def _container_environment(where: str, container: Mapping[str, Any], namespace: str) -> _Steps:
    """`envFrom`, then `env`, as kubelet does; what needs a pod (`fieldRef`) is left out."""
    environment: dict[str, str] = {}
    for item in _objects(where, container, "envFrom"):
        for kind, reference in _references(where, item, "Ref"):
            values = yield from _values(where, kind, reference, namespace)
            prefix = _text(where, item, "prefix")
            environment |= {prefix + key: values.text(key) for key in values.data}
    for item in _objects(where, container, "env"):
        name, source = _text(where, item, "name"), _mapping(where, item, "valueFrom")
        if not source:
            environment[name] = _expanded(_text(where, item, "value"), environment)
        for kind, reference in _references(where, source, "KeyRef"):
            values = yield from _values(where, kind, reference, namespace)
            key = _text(where, reference, "key")
            if key in values.data:
                environment[name] = values.text(key)
            elif reference.get("optional") is not True:
                raise _refused(f"{where}: {values.need} has no key {key[:100]!a}")
    return environment


def _references(
    where: str, raw: Mapping[str, Any], suffix: str
) -> Iterator[tuple[Kind, Mapping[str, Any]]]:
    for name, kind in ((f"secret{suffix}", Kind.SECRET), (f"configMap{suffix}", Kind.CONFIG_MAP)):
        if name in raw:
            yield kind, _mapping(where, raw, name)


def _values(where: str, kind: Kind, reference: Mapping[str, Any], namespace: str) -> _Steps:
    need = _need(kind, namespace, _text(where, reference, "name"))
    (raw,) = yield (need,)
    if raw is None and reference.get("optional") is not True:
        key = reference.get("key")
        wanted = f", key {key[:100]!a}" if isinstance(key, str) else ""
        raise _refused(f"{where}: {need}{wanted} is missing")
    return _secret(need, {} if raw is None else raw)


def _expanded(value: str, environment: Mapping[str, str]) -> str:
    """`$(NAME)` of what was set above it; `$$` is a dollar; an unknown name stays as it is."""

    def put(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else environment.get(match[1], match[0])

    return _REFERENCE.sub(put, value)


def _applied(where: str, environment: dict[str, str]) -> _Part:
    """A container may have STORAGE_CONFIG itself: the initializer reads it wherever it is from."""
    entry = dict(_json_texts(f"{where}, STORAGE_CONFIG", environment.pop("STORAGE_CONFIG", "{}")))
    override = environment.pop("STORAGE_OVERRIDE_CONFIG", "{}")
    entry |= _json_texts(f"{where}, STORAGE_OVERRIDE_CONFIG", override)
    return _spec(where, entry.get("type", ""), entry).over(_Part(environment=_clean(environment)))


# -- a CA bundle (kserve.md 5.2.1, 7.1 37, 9.1.10) ------------------------------------------------


def _ca_bundle(found: _Part, config: _Config) -> _Steps:
    """The one that the credentials name, which must be there; else the cluster's, if it is there.

    KServe's Jobs have neither; its init containers have both. Without the second, TLS fails and
    says so itself, for the models that need it alone.
    """
    key = posixpath.basename(found.environment.get("AWS_CA_BUNDLE", "")) or _CA_KEY
    unverified = found.environment.get("S3_VERIFY_SSL", "").lower() in ("0", "false")
    name = found.environment.get("AWS_CA_BUNDLE_CONFIGMAP")
    if name and not unverified:
        need = _need(Kind.CONFIG_MAP, config.job_namespace, name)
        (raw,) = yield (need,)
        if raw is None:
            raise _refused(f"{need}: the ConfigMap of the CA bundle is missing")
        bundle = _secret(need, raw)
        if not (present := next((k for k in (key, _CA_KEY) if k in bundle.data), "")):
            raise _refused(f"{need}, key {_CA_KEY}: the ConfigMap has no such key")
        return bundle.text(present)
    if found.certificate or not config.ca_config_map:
        return "" if unverified else found.certificate
    need = _need(Kind.CONFIG_MAP, config.namespace, config.ca_config_map)
    (raw,) = yield (need,)
    bundle = _secret(need, {} if raw is None else raw)
    return bundle.text(_CA_KEY) if _CA_KEY in bundle.data else ""


# -- reading an object, without a word of what is in it -------------------------------------------


@dataclass(frozen=True, slots=True)
class _Secret:
    """The data of a Secret, or of a ConfigMap, which is not in base64."""

    need: Need
    data: Mapping[str, Any] = field(repr=False)
    annotations: Mapping[str, Any] = field(repr=False)

    def content(self, key: str) -> bytes:
        where, value = f"{self.need}, key {key[:100]!a}", self.data.get(key)
        if key not in self.data:
            raise _refused(f"{where}: the secret has no such key")
        if not isinstance(value, str):
            raise _refused(f"{where}: it is not a text")
        if self.need.kind is Kind.SECRET:
            return _base64(where, value)
        return value.encode(errors="surrogatepass")

    def text(self, key: str) -> str:
        content = self.content(key)
        with suppress(UnicodeDecodeError):
            return content.decode()
        raise _refused(f"{self.need}, key {key[:100]!a}: it is not UTF-8")


def _secret(need: Need, raw: Any) -> _Secret:
    annotations = _mapping(need, raw, "metadata", "annotations")
    return _Secret(need, _mapping(need, raw, "data"), annotations)


def _mapping(where: object, raw: Any, *path: str) -> Mapping[str, Any]:
    """What is at a path, {} where there is nothing."""
    value = raw
    if not isinstance(value, Mapping):
        raise _refused(f"{where} is not an object")
    for depth, name in enumerate(path, start=1):
        value = value.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise _refused(f"{where}: {'.'.join(path[:depth])} is not an object")
    return value


def _objects(where: object, raw: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    listed = raw.get(name) or []
    if not isinstance(listed, list):
        raise _refused(f"{where}: {name} is not a list")
    for item in listed:
        if not isinstance(item, Mapping):
            raise _refused(f"{where}: {name} holds what is not an object")
        yield item


def _text(where: object, values: Mapping[str, Any], name: str) -> str:
    """What is there by a name, "" where there is nothing."""
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise _refused(f"{where}: {name} is not a text")
    return value or ""


def _json(where: str, text: Any) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):  # the last: a hundred thousand brackets
        value = None
    if not isinstance(value, Mapping):
        raise _refused(f"{where}: it is not a JSON object")
    return value


def _json_texts(where: str, text: str) -> Mapping[str, str]:
    value = _json(where, text)
    if not _is_texts(value):
        raise _refused(f"{where}: it is not an object of texts (quote numbers, true and false)")
    return value


def _is_texts(value: Any) -> bool:
    """Half a character (JSON can say one) would fail much later, in words that hold the text."""
    return isinstance(value, Mapping) and all(
        isinstance(part, str) and not _SURROGATE.search(part)
        for pair in value.items()
        for part in pair
    )


def _base64(where: str, text: str) -> bytes:
    with suppress(ValueError):
        return base64.b64decode(text)
    raise _refused(f"{where}: it is not base64")


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    """A token as the hub's own client reads it: without the line end that `echo` left in it."""
    return {
        name: re.sub(r"[\r\n]", "", value).strip() if name == "HF_TOKEN" else value
        for name, value in environment.items()
    }


def _need(kind: Kind, namespace: str, name: str) -> Need:
    """Both become part of an API server's path, and come from objects that others write."""
    if not _NAME.fullmatch(namespace):
        raise _refused(f"the namespace in which a {kind} is looked up is not a name")
    if not _NAME.fullmatch(name):
        raise _refused(f"a {kind} is named in {namespace} by what is not a name")
    return Need(kind, namespace, name)


def _field(raw: Mapping[str, Any], name: str) -> str:
    value = raw.get(name)
    if value is not None and not isinstance(value, str):
        raise _invalid(f"{name} is not a text")
    return value or ""


def _invalid(message: str) -> AgentError:
    return AgentError(Reason.INVALID_SPEC, message)


def _refused(message: str) -> AgentError:
    """To be tried again: objects are created and mended without a word to us."""
    return AgentError(Reason.UNAUTHORIZED, message)
