"""What KServe's ConfigMap says of credentials, and the settings of S3 that it may default."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.kube.credentials.nouns import Ask, Need
from agent.kube.credentials.objects import json_object, mapping, text_of

CONFIG_MAP = "inferenceservice-config"
DEFAULT_JOB_NAMESPACE = "kserve-localmodel-jobs"  # what KServe ships (kserve.md 2.2)
# kserve.md 5.2.1: annotation, variable and key of the secret, key of the ConfigMap's credentials.s3
S3_SETTINGS = (
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What KServe's ConfigMap says of credentials; its code's defaults where it says nothing."""

    namespace: str
    job_namespace: str
    secret_name: str
    secret_annotation: str
    s3: Mapping[str, str]
    gcs_file: str
    ca_config_map: str


def config_of(need: Need, raw: Any, asked: Ask) -> Config:
    data = mapping(need, {} if raw is None else raw, "data")
    section = {
        name: json_object(f"{need}, key {name}", data[name]) if name in data else {}
        for name in ("credentials", "localModel", "storageInitializer")
    }
    credentials = section["credentials"]
    s3 = mapping(need, section, "credentials", "s3")
    gcs = mapping(need, section, "credentials", "gcs")

    def text(values: Mapping[str, Any], name: str, default: str = "") -> str:
        return text_of(need, values, name) or default

    s3_names = ("s3AccessKeyIDName", "s3SecretAccessKeyName", *(row[2] for row in S3_SETTINGS))
    return Config(
        namespace=asked.config_namespace,
        job_namespace=asked.job_namespace
        or text(section["localModel"], "jobNamespace", DEFAULT_JOB_NAMESPACE),
        secret_name=text(credentials, "storageSpecSecretName", "storage-config"),
        secret_annotation=text(credentials, "storageSecretNameAnnotation"),
        s3={name: text(s3, name) for name in s3_names},
        gcs_file=text(gcs, "gcsCredentialFileName", "gcloud-application-credentials.json"),
        ca_config_map=text(section["storageInitializer"], "caBundleConfigMapName"),
    )
