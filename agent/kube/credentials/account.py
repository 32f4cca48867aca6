"""`serviceAccountName`: the secrets of a ServiceAccount (kserve.md 5.2 b)."""

from collections.abc import Iterator, Mapping
from typing import Any

from agent.kube.credentials.config import S3_SETTINGS, Config
from agent.kube.credentials.nouns import Ask, Kind, Need, Part, Steps, WebIdentity
from agent.kube.credentials.objects import Data, clean, data_of, mapping, named, refused, text_of
from agent.kube.credentials.spec import HDFS_DIRECTORY, HDFS_KEYS

_ANNOTATION = "serving.kserve.io/"
_ROLE = "eks.amazonaws.com/role-arn"
_GCS_DIRECTORY = "/var/secrets/"
_AZURE = (
    *("AZURE_SUBSCRIPTION_ID", "AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET"),
    *("AZURE_STORAGE_ACCESS_KEY", "AZURE_ACCESS_TOKEN", "AZURE_ACCESS_EXPIRES_ON_SECONDS"),
    *("AZURE_ACCOUNT_NAME", "AZURE_SERVICE_URL"),
)
_AZURE_LEGACY = {name: name.replace("AZURE_", "AZ_") for name in _AZURE[:4]}


def service_account(asked: Ask, config: Config) -> Steps:
    """A ServiceAccount that is missing is no error (kserve-observed.md 6); a secret of it is."""
    need = named(Kind.SERVICE_ACCOUNT, config.job_namespace, asked.service_account)
    (raw,) = yield (need,)
    if raw is None:
        return Part()
    annotations = mapping(need, raw, "metadata", "annotations")
    found = Part()
    if _ROLE in annotations:
        role = text_of(need, annotations, _ROLE)
        identity = WebIdentity(role=role, namespace=need.namespace, service_account=need.name)
        settings = _s3_settings(need, annotations, {}, config)
        found = Part(environment=settings, web_identity=identity if role else None)
    other = asked.annotations.get(config.secret_annotation)
    names = [other] if other else _secret_names(need, raw)
    wanted = tuple(named(Kind.SECRET, need.namespace, name) for name in names)
    seen: set[str] = set()
    for secret_need, raw_secret in zip(wanted, (yield wanted) if wanted else (), strict=True):
        if raw_secret is None:
            raise refused(f"{secret_need} is missing; {need} names it")
        purpose, part = _classified(data_of(secret_need, raw_secret), config)
        if purpose not in seen:  # of two for the same purpose, the first that is listed
            found = part.over(found)
        seen.add(purpose)
    return found


def _secret_names(need: Need, raw: Mapping[str, Any]) -> Iterator[str]:
    listed = raw.get("secrets") or []
    if not isinstance(listed, list):
        raise refused(f"{need}: secrets is not a list")
    for item in listed:
        yield text_of(need, mapping(need, {"secrets": item}, "secrets"), "name")


def _classified(secret: "Data", config: Config) -> tuple[str, Part]:
    """By the first of these keys that it has (the table of kserve.md 5.2 b), and no other."""
    if (config.s3["s3SecretAccessKeyName"] or "awsSecretAccessKey") in secret.data:
        return "s3", _s3(secret, config)
    if config.gcs_file in secret.data:
        path = _GCS_DIRECTORY + config.gcs_file
        content = secret.content(config.gcs_file)
        environment = {"GOOGLE_APPLICATION_CREDENTIALS": path}
        return "gcs", Part(environment=environment, files={path: content})
    if not {"AZ_CLIENT_ID", "AZURE_CLIENT_ID", "AZURE_ACCESS_TOKEN"}.isdisjoint(secret.data):
        return "azure", Part(environment=dict(_azure(secret)))
    if (key := "AZURE_STORAGE_ACCESS_KEY") in secret.data:
        return key, Part(environment={key: secret.text(key)})
    if "https-host" in secret.data:
        return _https(secret)
    if "HDFS_NAMENODE" in secret.data:
        keys = [key for key in HDFS_KEYS if key in secret.data]
        return "hdfs", Part(files={HDFS_DIRECTORY + key: secret.content(key) for key in keys})
    for key in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        if key in secret.data:
            return key, Part(environment=clean({key: secret.text(key)}))
    return "", Part()


def _s3(secret: "Data", config: Config) -> Part:
    keys = {
        "AWS_ACCESS_KEY_ID": config.s3["s3AccessKeyIDName"] or "awsAccessKeyID",
        "AWS_SECRET_ACCESS_KEY": config.s3["s3SecretAccessKeyName"] or "awsSecretAccessKey",
    }
    environment = {variable: secret.text(key) for variable, key in keys.items()}
    data = {name: secret.text(name) for _, name, _ in S3_SETTINGS if name in secret.data}
    return Part(
        environment=environment | _s3_settings(secret.need, secret.annotations, data, config)
    )


def _s3_settings(
    need: Need, annotations: Mapping[str, Any], data: Mapping[str, str], config: Config
) -> dict[str, str]:
    """Each from the annotation, else the secret's data, else the ConfigMap (kserve.md 5.2.1).

    One that is there and empty is taken: it keeps the next from being asked.
    """
    found = {}
    for suffix, variable, key in S3_SETTINGS:
        if _ANNOTATION + suffix in annotations:
            found[variable] = text_of(need, annotations, _ANNOTATION + suffix)
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


def _azure(secret: "Data") -> Iterator[tuple[str, str]]:
    for variable in _AZURE:
        for key in (_AZURE_LEGACY.get(variable, variable), variable):
            if key in secret.data:
                yield variable, secret.text(key)
                break


def _https(secret: "Data") -> tuple[str, Part]:
    """Headers for one host: several of these do not exclude each other."""
    host = secret.text("https-host")
    if "headers" not in secret.data:
        return f"https {host}", Part()
    return f"https {host}", Part(environment={f"{host}-headers": secret.text("headers")})
