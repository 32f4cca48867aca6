"""`storage.key`: an entry of the secret storage-config (kserve.md 5.2 a)."""

from collections.abc import Mapping

from agent.kube.credentials.config import Config
from agent.kube.credentials.nouns import Ask, Kind, Part, Steps
from agent.kube.credentials.objects import clean, data_of, from_base64, json_texts, named, refused

_PLACEHOLDER = "<scheme-placeholder>://"
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
HDFS_DIRECTORY = "/var/secrets/kserve-hdfscreds/"
HDFS_KEYS = (
    *("HDFS_NAMENODE", "USER_PROXY", "HDFS_ROOTPATH", "TLS_CERT", "TLS_KEY", "TLS_CA"),
    *("TLS_SKIP_VERIFY", "HEADERS", "N_THREADS", "KERBEROS_KEYTAB", "KERBEROS_PRINCIPAL"),
)
_HDFS_BASE64 = frozenset({"KERBEROS_KEYTAB", "TLS_CERT", "TLS_KEY", "TLS_CA"})


def storage_spec(asked: Ask, config: Config) -> Steps:
    name = asked.annotations.get(config.secret_annotation) or config.secret_name
    need = named(Kind.SECRET, config.job_namespace, name)
    (raw,) = yield (need,)
    kind = asked.parameters.get("type", "")
    key = asked.storage_key or (f"default_{kind}" if kind else "default")
    where = f"{need}, key {key[:100]!a}"
    entry: Mapping[str, str] = {}
    if raw is None:
        if asked.storage_key:
            raise refused(f"{where}: the secret is missing")
    else:
        secret = data_of(need, raw)
        if key in secret.data:
            entry = json_texts(where, secret.text(key))
        elif asked.storage_key:
            raise refused(f"{where}: the secret has no such key")
    kind = kind or entry.get("type", "")
    if not kind:
        raise refused(f"{where}: neither it nor storage.parameters says a type")
    if not asked.parameters.get("type") and kind not in _SPEC_VARIABLES:
        raise refused(f"{where}: its type is none of {', '.join(_SPEC_VARIABLES)}")
    return _real_uri(where, asked, kind, entry), spec_part(
        where, kind, {**entry, **asked.parameters}
    )


def spec_part(where: str, kind: str, entry: Mapping[str, str]) -> Part:
    """What the initializer does with STORAGE_CONFIG, overridden by STORAGE_OVERRIDE_CONFIG."""
    if kind == "hf" and not entry.get("token"):
        raise refused(f"{where}: an entry of type hf needs a token")
    variables = _SPEC_VARIABLES.get(kind, {})
    environment = {variables[key]: entry[key] for key in variables if key in entry}
    files = {}
    if kind in ("hdfs", "webhdfs"):
        for key in (key for key in HDFS_KEYS if key in entry):
            encoded = key in _HDFS_BASE64
            content = from_base64(f"{where}, {key}", entry[key]) if encoded else entry[key].encode()
            files[HDFS_DIRECTORY + key] = content
    certificate = entry.get("certificate", "") if kind == "s3" else ""  # as ModelMesh has it
    return Part(environment=clean(environment), files=files, certificate=certificate)


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
        raise refused(f"{where}: neither it nor storage.parameters names a bucket")
    return f"s3://{bucket}/{path}"
