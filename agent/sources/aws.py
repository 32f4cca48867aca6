"""The AWS side of `s3://`: a client made of an explicit environment, and what its errors mean.

Left alone, boto3 reads the environment of the process, its home directory and its metadata service.
Here it reads a mapping, because each model may have credentials of its own: what is not in the
mapping is not used. boto3 is imported by the first client: it costs 20 MiB, and a client 15 more.
"""

import functools
import logging
import os
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from agent.backoff import retry_after_seconds
from agent.errors import AgentError, Reason

_ENDPOINT = re.compile(r"https?://[^/@?#\s]+(?:/[^@?#\s]*)?", re.IGNORECASE)
_REGION = re.compile(r"[a-z0-9-]{1,40}", re.IGNORECASE)
_NAMES = ("AWS_", "S3_", "CA_BUNDLE_", "awsAnonymousCredential")
_NO_FILES = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
_HOME_FILES = {
    "AWS_CONFIG_FILE": "~/.aws/config",
    "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
}
# What names an identity of this machine, a file of it, or where its tokens are sent. A CA bundle of
# a cache comes as `authorities`: a path is one of KServe's container.
_OF_MACHINE = (
    *("AWS_CA_BUNDLE", "CA_BUNDLE_"),
    *("AWS_CONFIG_", "AWS_CONTAINER_", "AWS_EC2_", "AWS_ENDPOINT_URL_STS", "AWS_PROFILE"),
    *("AWS_ROLE_", "AWS_SHARED_", "AWS_WEB_IDENTITY_"),
)
CONNECTIONS = 16


def of_process(environment: Mapping[str, str]) -> dict[str, str]:
    """What this process was given, with the files of its user."""
    return _HOME_FILES | {k: v for k, v in environment.items() if k.startswith(_NAMES)}


def of_cache(environment: Mapping[str, str]) -> dict[str, str]:
    """What a cache was given: its keys or none. Who writes it is not who runs this machine, so it
    can neither use the machine's identity nor have the agent's token sent to an endpoint of its."""
    given = {k: v for k, v in environment.items() if not k.startswith(_OF_MACHINE)}
    return given | {"AWS_EC2_METADATA_DISABLED": "true"}


def is_region(name: str) -> bool:
    """It becomes a part of host names and signatures."""
    return _REGION.fullmatch(name) is not None


class Settings:
    """The names that KServe and the AWS SDKs use, read from one mapping; `authorities` are those
    whom TLS trusts where no variable says others. Raises InvalidSpec."""

    def __init__(self, environment: Mapping[str, str], authorities: str = "") -> None:
        self._authorities = authorities
        # A secret that was made with `echo` ends in a line feed.
        self.environment = _NO_FILES | {k: v.strip() for k, v in environment.items() if v.strip()}
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            value = self.environment.get(name, "")
            if not (value.isascii() and value.isprintable()) and value:
                # Said here, without it: HTTP's own complaint would quote it.
                raise AgentError(Reason.UNAUTHORIZED, f"{name} holds characters it must not")
        self.endpoint = self._endpoint()
        self.region = self._first("AWS_DEFAULT_REGION", "AWS_REGION") or "us-east-1"
        if not is_region(self.region):
            raise AgentError(Reason.INVALID_SPEC, f"{self.region[:60]!r} is not a region")
        self.anonymous = self._on("awsAnonymousCredential")
        self.virtual = self._on("S3_USER_VIRTUAL_BUCKET") or self._on("S3_USE_VIRTUAL_BUCKET")
        self.accelerate = self._on("S3_USE_ACCELERATE")
        self.verify = self._verify()
        self.connect_seconds = self._number("S3_CONNECT_TIMEOUT", 15)
        self.read_seconds = self._number("S3_READ_TIMEOUT", 30)
        self.attempts = self._number("S3_MAX_ATTEMPTS", 3)

    def _endpoint(self) -> str | None:
        """None for AWS itself, whose endpoint depends on the region of the bucket."""
        endpoint = self._first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL").rstrip("/")
        if not endpoint or endpoint.partition("://")[2] == "s3.amazonaws.com":
            return None
        if not _ENDPOINT.fullmatch(endpoint):
            # A name and a password in it would be shown in every message that names the endpoint.
            raise AgentError(
                Reason.INVALID_SPEC,
                "AWS_ENDPOINT_URL must be http[s]://host[:port][/path], no more",
            )
        return endpoint

    def _verify(self) -> bool | str:
        """As in boto3. A bundle that is not here was one of KServe's container: the authorities
        that were given, or the machine's, must do, and TLS says so if they do not."""
        if self.environment.get("S3_VERIFY_SSL", "").lower() in ("0", "false"):
            return False
        bundle = self._first("AWS_CA_BUNDLE")
        if not bundle and "CA_BUNDLE_CONFIGMAP_NAME" in self.environment:
            bundle = self._first("CA_BUNDLE_VOLUME_MOUNT_POINT") + "/cabundle.crt"
        return bundle if Path(bundle).is_file() else self._authorities or True

    def _first(self, *names: str) -> str:
        return next((self.environment[name] for name in names if name in self.environment), "")

    def _on(self, name: str) -> bool:
        return self.environment.get(name, "").lower() in ("1", "true")

    def _number(self, name: str, default: int) -> int:
        value = self.environment.get(name, "")
        return int(value) if value.isdecimal() and 0 < int(value) < 3600 else default

    @property
    def _trusted(self) -> bool | str:
        """boto3 has authorities of its own, unless told; the files come by the machine's, or those
        of SSL_CERT_FILE, and the listing should too."""
        if self.verify is not True:
            return self.verify
        return ssl.get_default_verify_paths().cafile or True

    @property
    def where(self) -> str:
        return self.endpoint or f"S3 in {self.region}"

    @property
    def who(self) -> str:
        """Whose credentials these are, fit for a message."""
        if self.anonymous:
            return "an anonymous user"
        if key := self._first("AWS_ACCESS_KEY_ID"):
            return f"the access key that ends in {key[-4:] if len(key) >= 12 else '...'}"
        if role := self._first("AWS_ROLE_ARN"):
            return f"the role {role[:200]}"
        return "the credentials of this machine"

    def client(self, region: str) -> Any:
        """An S3 client; it may be used by many threads. It takes a quarter of a second to make."""
        import boto3
        import botocore
        import urllib3
        from botocore.config import Config
        from botocore.session import Session

        # At DEBUG it would log every header and signature.
        logging.getLogger("botocore").setLevel(logging.WARNING)
        if self.verify is False:  # asked for: not to be said at every request
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        s3: dict[str, Any] = {"use_accelerate_endpoint": self.accelerate}
        if self.virtual or self.endpoint is None:
            s3["addressing_style"] = "virtual"  # else links go to AWS's global endpoint
        session = Session()
        session.register_component("data_loader", _loader())
        session.register_component("config_store", _config_store(session, self.environment))
        session.register_component("credential_provider", self._credentials(session))
        return boto3.Session(botocore_session=session).client(
            "s3",
            region_name=region,
            endpoint_url=self.endpoint,
            verify=self._trusted,
            config=Config(
                # Its default is version 2 for a link into an old region.
                signature_version=botocore.UNSIGNED if self.anonymous else "s3v4",
                s3=s3,
                connect_timeout=self.connect_seconds,
                read_timeout=self.read_seconds,
                retries={"mode": "standard", "total_max_attempts": self.attempts},
                max_pool_connections=CONNECTIONS,
                response_checksum_validation="when_required",  # else it is part of every link
                ignore_configured_endpoint_urls=True,
            ),
        )

    def _credentials(self, session: Any) -> Any:
        """boto3's own chain (keys, web identity, files, container, machine), of the mapping."""
        from botocore import credentials
        from botocore.config import Config
        from botocore.utils import InstanceMetadataFetcher

        environment = self.environment
        identity = {
            name: environment[variable]
            for name, variable in (
                ("role_arn", "AWS_ROLE_ARN"),
                ("web_identity_token_file", "AWS_WEB_IDENTITY_TOKEN_FILE"),
                ("role_session_name", "AWS_ROLE_SESSION_NAME"),
            )
            if variable in environment
        }

        # A store of one's own may have its token service at the same address; AWS's S3 has not.
        beside = None if ".amazonaws.com" in (self.endpoint or "") else self.endpoint

        def client(service: str, **options: Any) -> Any:
            config = Config(ignore_configured_endpoint_urls=True).merge(options.pop("config"))
            return session.create_client(
                service,
                region_name=self.region,
                endpoint_url=self._first("AWS_ENDPOINT_URL_STS") or beside,
                verify=self._trusted,
                config=config,
                **options,
            )

        return credentials.CredentialResolver(
            providers=[
                credentials.EnvProvider(environ=environment),
                credentials.AssumeRoleWithWebIdentityProvider(
                    load_config=lambda: {"profiles": {"": identity}},
                    client_creator=client,
                    profile_name="",
                    disable_env_vars=True,
                ),
                credentials.SharedCredentialProvider(
                    creds_filename=environment["AWS_SHARED_CREDENTIALS_FILE"],
                    profile_name=environment.get("AWS_PROFILE", "default"),
                ),
                credentials.ContainerProvider(environ=environment),
                credentials.InstanceMetadataProvider(
                    iam_role_fetcher=InstanceMetadataFetcher(
                        timeout=1, num_attempts=1, env=dict(environment)
                    )
                ),
            ]
        )


@functools.cache
def _loader() -> Any:
    """What botocore knows of the services, read once for all clients."""
    from botocore.loaders import create_loader

    return create_loader()


def _config_store(session: Any, environment: Mapping[str, str]) -> Any:
    """Every setting that botocore has, from the mapping or its default."""
    from botocore.configprovider import (
        BOTOCORE_DEFAUT_SESSION_VARIABLES,
        ConfigChainFactory,
        ConfigValueStore,
    )

    chain = ConfigChainFactory(session=session, environ=environment)
    return ConfigValueStore(
        mapping={
            name: chain.create_config_chain(
                instance_name=name,
                env_var_names=variables,
                config_property_names=in_file,
                default=default,
                conversion_func=convert,
            )
            for name, (in_file, variables, default, convert) in (
                BOTOCORE_DEFAUT_SESSION_VARIABLES.items()
            )
        }
    )


_NEEDS = "it needs s3:ListBucket on the bucket and s3:GetObject on its objects"
_REFUSED: Mapping[str, tuple[Reason, str]] = {
    "NoSuchBucket": (Reason.REPOSITORY_NOT_FOUND, "there is no such bucket"),
    "NoSuchKey": (Reason.FILE_NOT_FOUND, "there is no such object"),
    "AccessDenied": (Reason.UNAUTHORIZED, f"access is denied to {{who}}; {_NEEDS}"),
    "InvalidAccessKeyId": (
        Reason.UNAUTHORIZED,
        "{who} is not known there; it was deleted, or belongs to another endpoint",
    ),
    "SignatureDoesNotMatch": (
        Reason.UNAUTHORIZED,
        "the secret key is not that of {who}; set AWS_SECRET_ACCESS_KEY again",
    ),
    "ExpiredToken": (Reason.UNAUTHORIZED, "the session token of {who} has expired; renew it"),
    "InvalidToken": (Reason.UNAUTHORIZED, "the session token of {who} is not valid; renew it"),
    "RequestTimeTooSkewed": (
        Reason.UNAUTHORIZED,
        "this node's clock is {skew} the server's; set it (NTP), nothing else is wrong",
    ),
    "PermanentRedirect": (Reason.REPOSITORY_NOT_FOUND, "{elsewhere}"),
    "AuthorizationHeaderMalformed": (Reason.REPOSITORY_NOT_FOUND, "{elsewhere}"),
    "IllegalLocationConstraintException": (Reason.REPOSITORY_NOT_FOUND, "{elsewhere}"),
    "InvalidBucketName": (Reason.INVALID_SPEC, "that is no bucket's name"),
    "SlowDown": (Reason.RATE_LIMITED, "it asks for fewer requests (SlowDown)"),
    "RequestTimeout": (Reason.SERVER_ERROR, "it gave up waiting for the request"),
}
_ALIASES = {
    **dict.fromkeys(("403", "401", "Forbidden", "AllAccessDisabled"), "AccessDenied"),
    **dict.fromkeys(("ExpiredTokenException", "RequestExpired"), "ExpiredToken"),
    **dict.fromkeys(("TokenRefreshRequired", "UnrecognizedClientException"), "InvalidToken"),
    **dict.fromkeys(("Throttling", "ThrottlingException", "TooManyRequests", "429"), "SlowDown"),
    "301": "PermanentRedirect",
}


@contextmanager
def s3_errors(what: str, settings: Settings) -> Iterator[None]:
    """Map what boto3 raises to reasons, with what to do about it."""
    from botocore import exceptions as boto

    where, who = settings.where, settings.who
    try:
        yield
    except boto.ClientError as error:
        raise _refused(error, what, settings) from error
    except boto.NoCredentialsError as error:
        raise AgentError(
            Reason.UNAUTHORIZED,
            f"{what}: there are no credentials for {where}; give AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a role, or awsAnonymousCredential=true for a public bucket",
        ) from error
    except (
        boto.PartialCredentialsError,
        boto.CredentialRetrievalError,
        boto.InvalidConfigError,
        boto.MetadataRetrievalError,
        boto.ConfigParseError,
    ) as error:
        raise AgentError(Reason.UNAUTHORIZED, f"{what}: no credentials: {_line(error)}") from error
    except (boto.ReadTimeoutError, boto.ConnectTimeoutError) as error:
        raise AgentError(Reason.STALLED, f"{what}: {where} did not answer in time") from error
    except (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError) as error:
        # Its own text names a URL; the cause is what the reader wants.
        why = _line(error.kwargs.get("error") or error)
        raise AgentError(Reason.NETWORK, f"{what}: cannot reach {where}: {why}") from error
    except boto.ParamValidationError as error:
        raise AgentError(Reason.INVALID_SPEC, f"{what}: {_line(error)}") from error
    except RecursionError as error:  # boto3 asks where the bucket is, of who says: elsewhere
        raise AgentError(
            Reason.REPOSITORY_NOT_FOUND,
            f"{what}: the bucket is not in {settings.region!r}; set AWS_REGION",
        ) from error
    except OSError as error:  # the file of a web identity
        raise AgentError(
            Reason.UNAUTHORIZED, f"{what}: cannot read the credentials of {who}: {error.strerror}"
        ) from error
    except (boto.BotoCoreError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise AgentError(
            Reason.BAD_RESPONSE, f"{what}: {where} does not answer like S3: {_line(error)}"
        ) from error


def _refused(error: Any, what: str, settings: Settings) -> AgentError:
    answer = error.response
    about, details = answer.get("ResponseMetadata", {}), answer.get("Error", {})
    status, headers = about.get("HTTPStatusCode", 0), about.get("HTTPHeaders", {})
    given = str(details.get("Code", ""))
    code = _ALIASES.get(given, given)
    said = f"{what}: {settings.where} answers {status} {given[:60]}".rstrip()
    later = retry_after_seconds(headers.get("retry-after"), now=time.time())
    if error.operation_name.startswith("AssumeRole"):
        code = "" if status >= 500 or code == "SlowDown" else "AssumeRole"
        said = f"{what}: the token service answers {status} {given[:60]} for {settings.who}"
    if code == "AssumeRole":
        return AgentError(
            Reason.UNAUTHORIZED, f"{said}; check the role's trust policy and the service account"
        )
    if code in _REFUSED:
        reason, words = _REFUSED[code]
        region = headers.get("x-amz-bucket-region") or str(details.get("Region") or "")
        there = f"in region {region[:40]!r}, not" if region else "not"
        words = words.format(
            who=settings.who,
            skew=_skew(headers.get("date"), time.time()),
            elsewhere=f"the bucket is {there} in {settings.region!r}; set AWS_REGION",
        )
        return AgentError(reason, f"{said}: {words}", retry_after_seconds=later)
    if status >= 500 or code == "":
        return AgentError(Reason.SERVER_ERROR, said, retry_after_seconds=later)
    if status in (401, 403):
        return AgentError(Reason.UNAUTHORIZED, said)
    if status == 404:
        return AgentError(Reason.REPOSITORY_NOT_FOUND, said)
    return AgentError(Reason.BAD_RESPONSE, said)


def _skew(date: str | None, now: float) -> str:
    try:
        ahead = now - parsedate_to_datetime(date or "").timestamp()
    except (TypeError, ValueError):
        return "not near"
    return f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'}"


def _line(error: object) -> str:
    """One line of an error's text. It may be made of what a server sent."""
    text = " ".join(str(error).split())
    return ascii(text)[1:-1][:200]
