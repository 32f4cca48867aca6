"""`gs://bucket/prefix`: Google Cloud Storage, by its S3-compatible interface.

One protocol for both: HMAC keys sign as AWS's do, and a public bucket is read without any. What
Google's own keys (a service account's JSON, the machine's identity) would sign is another protocol;
who has only those is told to make HMAC keys, and is never read for as nobody.
"""

import os
from collections.abc import Mapping

from agent.errors import AgentError, Reason
from agent.model import Listing, ModelRef
from agent.sources.s3 import S3

_ENDPOINT = "https://storage.googleapis.com"
_KEYS = (
    ("GS_ACCESS_KEY_ID", "GS_SECRET_ACCESS_KEY"),
    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
)
_ACCOUNT = "GOOGLE_APPLICATION_CREDENTIALS"
_ALIKE = ("CA_BUNDLE_", "S3_VERIFY_SSL", "AWS_CA_BUNDLE", "S3_CONNECT_", "S3_READ_", "S3_MAX_")
_HOW = (
    "make HMAC keys for the service account (gcloud storage hmac create) and give them as"
    " GS_ACCESS_KEY_ID and GS_SECRET_ACCESS_KEY, or in a Secret of the cache as AWS_ACCESS_KEY_ID"
    " and AWS_SECRET_ACCESS_KEY"
)


class GoogleStorage(S3):
    """Google's buckets, with the HMAC keys of one environment or none."""

    scheme = "gs"

    _asking: Mapping[str, str] = {}  # it says what it knows of an object unasked

    @classmethod
    def _given(cls, environment: Mapping[str, str] | None) -> dict[str, str]:
        """Of a cache, or of this process, whose AWS keys are for AWS. Raises Unauthorized for keys
        of another kind."""
        if environment is None:
            environment = {k: v for k, v in os.environ.items() if k not in _KEYS[1]}
        return _as_s3(environment)

    async def list(self, ref: ModelRef) -> Listing:
        try:
            return await super().list(ref)
        except AgentError as error:
            if error.reason is not Reason.UNAUTHORIZED or not self._settings.anonymous:
                raise
            said = f"{error.message}; where the bucket is not public, {_HOW}"
            raise AgentError(Reason.UNAUTHORIZED, said) from error


def _as_s3(environment: Mapping[str, str]) -> dict[str, str]:
    given = {k: v.strip() for k, v in environment.items() if v.strip()}
    like = {k: v for k, v in given.items() if k.startswith(_ALIKE)}
    settings = {
        "AWS_ENDPOINT_URL": given.get("GS_ENDPOINT_URL", _ENDPOINT),
        "AWS_DEFAULT_REGION": "auto",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for key, secret in _KEYS:
        if key in given and secret in given:
            keys = {"AWS_ACCESS_KEY_ID": given[key], "AWS_SECRET_ACCESS_KEY": given[secret]}
            return like | settings | keys
    if _ACCOUNT in given:
        raise AgentError(
            Reason.UNAUTHORIZED, f"gs:// is not read with a service account's JSON; {_HOW}"
        )
    return like | settings | {"awsAnonymousCredential": "true"}
