"""A real etcd and kube-apiserver for tests, on loopback, with RBAC on and every request audited.

    with ControlPlane(directory) as plane:
        plane.kubectl("get", "namespaces")                       # the real kubectl, as admin
        plane.request("GET", "/api/v1/secrets", token=token)     # one request, as anybody

Nothing here needs root. What tests/node needs besides (its addresses, its mount namespace, more
certificates) are arguments; there the same class is the control plane of a real node.
"""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import yaml

from tests.cluster.pki import Authority, Certificate
from tests.machine import DEADLINE, REPOSITORY, until

_START_SECONDS = 120.0
_MERGE_PATCH = "application/merge-patch+json"
_JSON = "application/json"
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


def version() -> str:
    """The Kubernetes version under test: K8S_VERSION, else the one that go.mod names."""
    if chosen := os.environ.get("K8S_VERSION"):
        return chosen
    lines = (REPOSITORY / "tests/controlplane/go.mod").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.split()[:1] == ["k8s.io/kubernetes"])


def binaries(*names: str) -> Mapping[str, Path]:
    """Where these programs are: in KUBEBUILDER_ASSETS, else where `make control-plane` puts them.

    Without them the test is skipped, with one line that says how to get them; with CI=true that is
    a failure, because there a skipped test would look like a passed one.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = [base / "localmodel-agent/control-plane" / version() / "bin"]
    if assets := os.environ.get("KUBEBUILDER_ASSETS"):
        places.insert(0, Path(assets))
    found = {
        name: place / name
        for name in names
        for place in reversed(places)
        if (place / name).exists()
    }
    if missing := [name for name in names if name not in found]:
        told = (
            f"NOT TESTED on a real API server: no {', '.join(missing)} {version()};"
            " run `make control-plane` once (needs go)"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(told, pytrace=False)
        pytest.skip(told)
    return found


class KubectlError(RuntimeError):
    """kubectl ended with an error; the text is what it printed to stderr."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the API server answered to one request."""

    status: int
    body: Any
    warnings: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        return str(self.body.get("message", "")) if isinstance(self.body, dict) else str(self.body)

    def ok(self) -> Any:
        assert 200 <= self.status < 300, self
        return self.body


class _Process:
    """One server: its log, and its end by its own pid, also when it runs behind a `nsenter`."""

    def __init__(self, arguments: Sequence[str | Path], log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                list(map(str, arguments)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C is for pytest, which then stops us in order
            )

    def tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-20:])

    def check_running(self) -> None:
        if self._popen.poll() is not None:
            raise RuntimeError(f"{self._popen.args!r} ended:\n{self.tail()}")

    @property
    def pid(self) -> int:
        """Of the server itself: the last of the line, if a prefix command forks."""
        family = psutil.Process(self._popen.pid).children(recursive=True)
        return family[-1].pid if family else self._popen.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """With its children: those of a killed `nsenter` would live on, and keep the port."""
        family: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
            family = psutil.Process(self._popen.pid).children(recursive=True)
        for child in family:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self._popen.kill()
        self._popen.wait()
        psutil.wait_procs(family, timeout=DEADLINE)


class ControlPlane:
    """etcd and kube-apiserver with their state in `directory`; a context manager."""

    def __init__(
        self,
        directory: Path,
        *,
        bind_address: str = "127.0.0.1",
        port: int | None = None,
        service_cidr: str = "10.96.0.0/16",
        serves: Sequence[str] = (),
        allow_privileged: bool = False,
        flags: Sequence[str | Path] = (),
        prefix: Sequence[str] = (),
    ) -> None:
        """`flags` are more flags of kube-apiserver; the last one wins. `serves` are more names in
        its certificate. `prefix` is a command to run both servers under, as `nsenter -t 1 -m`."""
        self.directory = directory
        self.programs = binaries("etcd", "kube-apiserver", "kubectl")
        self._etcd_port, etcd_peer_port, self.port = _free_ports(3)
        self.port = port or self.port
        self.url = f"https://{bind_address}:{self.port}"
        self._etcd_peer = f"http://127.0.0.1:{etcd_peer_port}"
        self._etcd_client = f"http://127.0.0.1:{self._etcd_port}"
        self._bind_address = bind_address
        self._service_cidr = service_cidr
        self._serves = serves
        self._allow_privileged = allow_privileged
        self._flags = flags
        self._prefix = prefix
        self._running: dict[str, _Process] = {}

    # -- life -----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop both. The logs stay; etcd's data go, 64 MiB however little is in them."""
        self.stop()
        shutil.rmtree(self.directory / "etcd", ignore_errors=True)

    def start(self) -> Self:
        """Start both, until the API server is ready."""
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._start_etcd()
            self._make_pki()
            until(self._etcd_healthy, self._running["etcd"].tail, seconds=_START_SECONDS)
            self._start_apiserver()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Kill both: nothing that they hold is wanted any more."""
        for name in reversed(list(self._running)):
            self._running.pop(name).kill()

    @property
    def apiserver_pid(self) -> int:
        return self._running["kube-apiserver"].pid

    def kill_apiserver(self) -> None:
        """SIGKILL, as an out-of-memory kill is. etcd runs on."""
        self._running.pop("kube-apiserver").kill()

    def restart_apiserver(self) -> None:
        """On the same port, with the same data and an empty watch cache; until it is ready."""
        if "kube-apiserver" in self._running:
            self.kill_apiserver()
        self._start_apiserver()

    def signal_apiserver(self, number: signal.Signals) -> None:
        """For instance SIGSTOP and SIGCONT: a server that accepts and never answers."""
        self._running["kube-apiserver"].signal(number)

    def compact(self) -> int:
        """Make etcd forget every revision but the newest; which one that is.

        A running API server still serves old revisions from its watch cache. A watch from one gives
        410 after `restart_apiserver()`, or at once where `--watch-cache=false` is among the flags.
        """
        # A watch begins one after the revision it names, so the newest alone would not be too old.
        for value in ("bQ==", "bg=="):
            put = self._etcd("kv/put", {"key": "bG9jYWxtb2RlbC10ZXN0", "value": value})
        revision = int(put["header"]["revision"])
        self._etcd("kv/compaction", {"revision": str(revision), "physical": True})
        return revision

    # -- who asks -------------------------------------------------------------------------------

    def certificate(self, name: str, subject: str, *, serves: Sequence[str] = ()) -> Certificate:
        """A certificate of this cluster's authority, see `Authority.issue`."""
        return self.authority.issue(name, subject, serves=serves)

    def kubeconfig(self, name: str = "admin", subject: str = "") -> Path:
        """Admin's, or that of a new user with a certificate: `("sched", "/CN=system:...")`."""
        path = self.directory / f"{name}.kubeconfig"
        if not path.exists():
            crt, key = self.certificate(name, subject)
            self._write_kubeconfig(path, {"client-certificate": str(crt), "client-key": str(key)})
        return path

    def token_kubeconfig(self, path: Path, token_file: Path) -> Path:
        """One whose token is in a file, as in a pod: whoever rewrites the file rotates it."""
        return self._write_kubeconfig(path, {"tokenFile": str(token_file)})

    def token(
        self,
        serviceaccount: str,
        namespace: str,
        pod: str | None = None,
        uid: str | None = None,
        *,
        seconds: int = 3600,
    ) -> str:
        """A token from the TokenRequest API; bound to the pod, and so to its node, if one is named.

        The pod needs `spec.nodeName` and the Node must exist: else the node claim is not in it.
        """
        base = f"/api/v1/namespaces/{namespace}"
        spec: dict[str, Any] = {"expirationSeconds": seconds}
        if pod is not None:
            uid = uid or self.request("GET", f"{base}/pods/{pod}").ok()["metadata"]["uid"]
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": pod, "uid": uid}
        path = f"{base}/serviceaccounts/{serviceaccount}/token"
        answer = self.request("POST", path, {"spec": spec})
        return str(answer.ok()["status"]["token"])

    # -- asking ---------------------------------------------------------------------------------

    def kubectl(self, *args: str | Path, input: str | None = None, user: Path | None = None) -> str:
        """What kubectl prints, as admin or as the user of that kubeconfig. Raises KubectlError."""
        done = self._kubectl(*args, input=input, user=user)
        if done.returncode != 0:
            raise KubectlError(done.stderr.strip())
        return done.stdout

    def told(self, *args: str | Path, input: str | None = None) -> str:
        """What a person sees who runs this kubectl: warnings and refusals, too."""
        done = self._kubectl(*args, input=input)
        return f"{done.stdout}{done.stderr}".strip()

    def _kubectl(
        self, *args: str | Path, input: str | None = None, user: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.programs["kubectl"], *args],
            input=input,
            capture_output=True,
            text=True,
            check=False,
            # No proxy and no kubeconfig of whoever runs the tests.
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.directory),
                "KUBECONFIG": str(user or self.kubeconfig()),
            },
        )

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Server-side apply of these objects, as admin."""
        text = yaml.safe_dump_all(map(dict, objects))
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=text)

    def get(self, *args: str) -> Any:
        """`kubectl get ... -o json`, parsed."""
        return json.loads(self.kubectl("get", *args, "-o", "json"))

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        content_type: str | None = None,
    ) -> Answer:
        """One request, as admin or with this token; a PATCH is a JSON merge patch unless said.

        The body of a watch (`?watch=1&timeoutSeconds=1`) is the list of its events.
        """
        headers = {"Accept": _JSON}
        headers["Content-Type"] = content_type or (_MERGE_PATCH if method == "PATCH" else _JSON)
        context = self._admin_tls
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
            context = self._anonymous_tls
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        # Without a proxy: the environment's is for the world, and this is loopback.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            answered = opener.open(asked, timeout=60)
        except urllib.error.HTTPError as error:
            answered = error
        with answered:
            text = answered.read().decode()
            warnings = tuple(answered.headers.get_all("Warning") or ())
            said: Any = text
            if answered.headers.get_content_type() == _JSON:
                lines = text.splitlines() if "watch=1" in path else ()
                said = [json.loads(line) for line in lines] if lines else json.loads(text or "null")
            return Answer(answered.status, said, warnings)

    def audit(self) -> list[dict[str, Any]]:
        """Every request so far, as audit.k8s.io/v1 Events. A watch is two: begun, and ended."""
        lines = (self.directory / "audit.json").read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    # -- inside ---------------------------------------------------------------------------------

    def _make_pki(self) -> None:
        pki = self.directory / "pki"
        if pki.exists():  # started again on its old state
            return
        self.authority = Authority(pki)
        self._signing_keys = self.authority.key_pair("sa")
        service = next(ip_network(self._service_cidr).hosts())
        names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"]
        addresses = ["127.0.0.1", self._bind_address, str(service)]
        self._serving = self.certificate(
            "apiserver",
            "/CN=kube-apiserver",
            serves=[f"DNS:{name}" for name in names]
            + [f"IP:{address}" for address in dict.fromkeys(addresses)]
            + list(self._serves),
        )
        self.kubeconfig("admin", "/O=system:masters/CN=admin")
        self._anonymous_tls = ssl.create_default_context(cafile=str(self.authority.crt))
        self._admin_tls = ssl.create_default_context(cafile=str(self.authority.crt))
        self._admin_tls.load_cert_chain(pki / "admin.crt", pki / "admin.key")

    def _start_etcd(self) -> None:
        self._running["etcd"] = _Process(
            [
                *self._prefix,
                self.programs["etcd"],
                f"--data-dir={self.directory / 'etcd'}",
                f"--listen-client-urls={self._etcd_client}",
                f"--advertise-client-urls={self._etcd_client}",
                f"--listen-peer-urls={self._etcd_peer}",
                f"--initial-advertise-peer-urls={self._etcd_peer}",
                f"--initial-cluster=default={self._etcd_peer}",
                "--unsafe-no-fsync",  # the disk of a test need not survive a power cut
                "--log-level=warn",
            ],
            self.directory / "etcd.log",
        )

    def _start_apiserver(self) -> None:
        policy = self.directory / "audit-policy.json"
        policy.write_text(json.dumps(_AUDIT_POLICY))
        private, public = self._signing_keys
        self._running["kube-apiserver"] = _Process(
            [
                *self._prefix,
                self.programs["kube-apiserver"],
                f"--etcd-servers={self._etcd_client}",
                f"--bind-address={self._bind_address}",
                f"--advertise-address={self._bind_address}",
                f"--secure-port={self.port}",
                f"--service-cluster-ip-range={self._service_cidr}",
                # A loopback address is refused as an endpoint; nobody here needs the endpoint.
                "--endpoint-reconciler-type=none",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--anonymous-auth=false",
                f"--allow-privileged={str(self._allow_privileged).lower()}",
                f"--client-ca-file={self.authority.crt}",
                f"--tls-cert-file={self._serving.crt}",
                f"--tls-private-key-file={self._serving.key}",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={public}",
                f"--service-account-signing-key-file={private}",
                f"--audit-log-path={self.directory / 'audit.json'}",
                f"--audit-policy-file={policy}",
                "--profiling=false",
                *self._flags,
            ],
            self.directory / "apiserver.log",
        )
        server = self._running["kube-apiserver"]
        until(self._apiserver_ready, server.tail, seconds=_START_SECONDS)

    def _etcd_healthy(self) -> bool:
        self._running["etcd"].check_running()
        try:
            self._etcd("kv/range", {"key": "AA=="})
        except urllib.error.URLError:
            return False
        return True

    def _apiserver_ready(self) -> bool:
        self._running["kube-apiserver"].check_running()
        try:
            return self.request("GET", "/readyz").status == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    def _etcd(self, path: str, body: Mapping[str, Any]) -> Any:
        """etcd's gRPC gateway; bytes are base64 there."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        asked = urllib.request.Request(
            f"{self._etcd_client}/v3/{path}", data=json.dumps(body).encode(), method="POST"
        )
        with opener.open(asked, timeout=60) as answered:
            return json.load(answered)

    def _write_kubeconfig(self, path: Path, user: Mapping[str, str]) -> Path:
        cluster = {"server": self.url, "certificate-authority": str(self.authority.crt)}
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "test", "cluster": cluster}],
                    "users": [{"name": "test", "user": dict(user)}],
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                    "current-context": "test",
                }
            )
        )
        return path


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has now. All are held until the last is known, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
