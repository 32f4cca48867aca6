"""A real one-node cluster: control plane, containerd, kubelet and pods, on one machine, in seconds.

    with Node() as node:
        node.plane.apply({"apiVersion": "v1", "kind": "Pod", ...})

Everything but kubectl runs in one mount and PID namespace. So what kubelet mounts never reaches the
host, and killing the namespace's first process ends every server, shim and container with it. That
process dies with pytest, whichever way pytest ends.

What the host sees of it meanwhile is in `STATE` and in `tests.node.host`, and is removed at the
end or, if there was no end, at the next start. There is no kube-proxy and no DNS.
"""

import json
import os
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from tests.cluster.control_plane import ControlPlane, KubectlError, binaries
from tests.machine import until
from tests.node import host
from tests.node.archive import pack
from tests.node.host import ADDRESS, NAME
from tests.node.packages import CACHE, locked, made_once, need_host, run, unpacked

BUSYBOX = "localhost/busybox:dev"
STATE = CACHE / "state"
LOGS = CACHE / "logs"

_PAUSE = "localhost/pause:dev"
_PODS = "10.88.77.0/24"
_SERVICES = "10.96.0.0/16"

_KERNEL_PARAMETERS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1_000_000,
    "kernel/keys/root_maxbytes": 25_000_000,
}
"""kubelet would set these on the host. In the namespace, files that hold them already hide them."""

_BECOME_THE_NODE = """
mount --make-rshared /
cd "$1/kernel"
find . -type f | while read -r file; do mount --bind "$file" "/proc/sys/$file"; done
cd /
mount -t tmpfs containerd "$1/containerd"
first=$2 state=$1
shift 2
for directory; do mount --bind "$state/mounts$directory" "$directory"; done
exec "$first" -P
"""
"""Layers of containers are in memory: each that goes syncs the whole disk it was on. Of these tests
the largest two files took 255 s so, and 321 s on a disk."""

_CONTAINERD = """
version = 2
root = "{state}/containerd"
state = "/run/containerd"
# Lowering it, which is the default, needs a capability that root has not got everywhere.
oom_score = 0
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp",
]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{state}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{packages}/usr/lib/cni"
    conf_dir = "{state}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "{packages}/usr/sbin/runc"
"""


def on_host(path: str) -> Path:
    """Where the host finds what the node has at one of these: `/models`, say."""
    return STATE / f"mounts{path}"


class _Server:
    """A program in the namespace, with a log; `pid` is the host's number for it."""

    def __init__(self, name: str, command: Sequence[str | Path], path: str = "") -> None:
        self.log = LOGS / f"{name}.log"
        with self.log.open("ab") as output:
            self._popen = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd="/",
                env={"PATH": f"{path}:{os.environ['PATH']}", "HOME": "/root"},
            )

    @property
    def pid(self) -> int:
        """Of the only child: what was started is `nsenter` or `unshare`, which wait for it."""
        waiting = self._popen.pid
        children = Path(f"/proc/{waiting}/task/{waiting}/children").read_text().split()
        return int(children[0]) if children else 0

    def running(self) -> bool:
        return self._popen.poll() is None

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.running() and (pid := self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        try:
            # Long: with the last process go all of the node's mounts.
            self._popen.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


class Node:
    """See the module. A second one on the same machine waits for the end of the first."""

    plane: ControlPlane

    def __init__(self) -> None:
        need_host()
        self._programs = binaries(
            "etcd", "kube-apiserver", "kubectl",  # which the control plane looks for too, but late
            "kube-controller-manager", "kube-scheduler", "kubelet",
        )  # fmt: skip
        self._servers: dict[str, _Server] = {}
        self._exit = ExitStack()

    # -- life -----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        with self._exit as stack:
            stack.enter_context(locked("node"))
            _clean_up()  # after a run that was killed
            stack.callback(_clean_up)
            stack.callback(self._stop)
            self._start()
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _start(self) -> None:
        self._packages = unpacked(
            "containerd", "runc", "containernetworking-plugins", "busybox-static", "catatonit"
        )
        shutil.rmtree(LOGS, ignore_errors=True)  # kept after the end, for whoever wants to know
        for directory in (STATE / "containerd", LOGS):
            directory.mkdir(parents=True)
        for path in host.MOUNT_POINTS:
            on_host(path).mkdir(parents=True)
        self._write_configuration()
        host.set_up()
        self._start_namespace()
        self.start("containerd")
        pki = STATE / "control-plane/pki"
        self.plane = ControlPlane(
            STATE / "control-plane",
            bind_address=host.API_ADDRESS,
            port=443,
            service_cidr=_SERVICES,
            serves=[f"IP:{ADDRESS}"],
            allow_privileged=True,
            flags=[
                f"--kubelet-client-certificate={pki / 'admin.crt'}",
                f"--kubelet-client-key={pki / 'admin.key'}",
                f"--kubelet-certificate-authority={pki / 'ca.crt'}",
                "--kubelet-preferred-address-types=InternalIP",
                # There is no kube-proxy: webhooks are called where their pods are.
                "--enable-aggregator-routing=true",
            ],
            prefix=self.inside(),
        )
        self.plane.start()
        self._exit.callback(self.plane.stop)
        self.plane.certificate(
            "kubelet-server",
            f"/O=system:nodes/CN=system:node:{NAME}",
            serves=[f"DNS:{NAME}", f"IP:{ADDRESS}"],
        )
        self.start("kube-controller-manager")
        self.start("kube-scheduler")
        until(self._containerd_serves, self._servers["containerd"].tail, seconds=60)
        for image in (self._pause_image(), self._busybox_image()):
            self.load(image)
        self.start("kubelet")
        until(self._ready, self._servers["kubelet"].tail, seconds=90)

    def _stop(self) -> None:
        for server in self._servers.values():
            server.stop(signal.SIGKILL)

    # -- for tests ------------------------------------------------------------------------------

    def inside(self) -> list[str]:
        """A prefix that runs a command in the node's namespaces: it sees what kubelet mounted."""
        return ["nsenter", "-t", str(self._servers["namespace"].pid), "-m", "-p", "--"]

    def load(self, archive: Path) -> None:
        """Put the images of a `docker save` archive on the node; pods name them, never pulled."""
        self._ctr("images", "import", archive)

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End `containerd` or `kubelet`; pods run on."""
        self._servers.pop(name).stop(number)

    def start(self, name: str) -> None:
        """Start it, until it serves."""
        command = [*self.inside(), *map(str, self._command(name))]
        programs = self._packages / "usr"

        def begin() -> None:
            self._servers[name] = _Server(name, command, f"{programs}/bin:{programs}/sbin")

        begin()
        if name != "kubelet":
            return

        def healthy() -> bool:
            # It ends itself while containerd is not quite up, and a service manager restarts it.
            if not self._servers[name].running():
                begin()
            return _answers("http://127.0.0.1:10248/healthz")

        until(healthy, lambda: self._servers[name].tail(), seconds=60)

    def restart(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        self.stop(name, number)
        self.start(name)
        if name == "containerd":
            until(self._containerd_serves, self._servers[name].tail, seconds=60)

    def kill_sandbox(self, namespace: str, pod: str) -> None:
        """As after a crash of the machine: kubelet makes another, and the pod begins anew."""
        wanted = (
            f'labels."io.kubernetes.pod.namespace"=={namespace},'
            f'labels."io.kubernetes.pod.name"=={pod},'
            'labels."io.cri-containerd.kind"==sandbox'
        )
        (sandbox,) = self._ctr("containers", "ls", "--quiet", wanted).split()
        self._ctr("tasks", "kill", "--signal=SIGKILL", sandbox)

    def log(self, name: str) -> str:
        return self._servers[name].log.read_text(errors="replace")

    # -- inside ---------------------------------------------------------------------------------

    def _command(self, name: str) -> list[str | Path]:
        pki = STATE / "control-plane/pki"
        match name:
            case "containerd":
                return [
                    self._packages / "usr/bin/containerd",
                    "--config",
                    STATE / "containerd.toml",
                ]
            case "kubelet":
                user = self.plane.kubeconfig("kubelet", f"/O=system:nodes/CN=system:node:{NAME}")
                return [
                    self._programs["kubelet"],
                    f"--config={STATE / 'kubelet.json'}",
                    f"--kubeconfig={user}",
                    f"--root-dir={STATE / 'kubelet'}",
                    f"--cert-dir={pki}",
                    f"--hostname-override={NAME}",
                    f"--node-ip={ADDRESS}",
                    "--v=2",
                ]
            case "kube-controller-manager":
                extra = [
                    "--use-service-account-credentials",
                    f"--flex-volume-plugin-dir={STATE / 'volume-plugins'}",
                    f"--service-account-private-key-file={pki / 'sa.key'}",
                    f"--root-ca-file={pki / 'ca.crt'}",
                ]
            case _:
                extra = []
        user = self.plane.kubeconfig(name, f"/CN=system:{name}")
        return [
            self._programs[name],
            f"--kubeconfig={user}",
            f"--authentication-kubeconfig={user}",
            f"--authorization-kubeconfig={user}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            "--profiling=false",
            *extra,
        ]

    def _write_configuration(self) -> None:
        (STATE / "containerd.toml").write_text(
            _CONTAINERD.format(state=STATE, packages=self._packages, pause=_PAUSE)
        )
        network = {
            "cniVersion": "0.4.0",
            "name": NAME,
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": host.BRIDGE,
                    "hairpinMode": True,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": str(STATE / "addresses"),
                        "ranges": [[{"subnet": _PODS, "gateway": ADDRESS}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                }
            ],
        }
        (STATE / "cni").mkdir()
        (STATE / "cni/10-node.conflist").write_text(json.dumps(network))
        pki = STATE / "control-plane/pki"
        kubelet = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "x509": {"clientCAFile": str(pki / "ca.crt")},
            },
            "address": ADDRESS,
            "tlsCertFile": str(pki / "kubelet-server.crt"),
            "tlsPrivateKeyFile": str(pki / "kubelet-server.key"),
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{NAME}",
            "failSwapOn": False,
            # Both need a capability that root has not got everywhere.
            "oomScoreAdj": 0,
            "maxOpenFiles": 20_000,
            "podLogsDir": str(STATE / "pod-logs"),
            "volumePluginDir": str(STATE / "volume-plugins"),
            "resolvConf": "",
            # These would be the host's, whose network this is.
            "makeIPTablesUtilChains": False,
            # The disk of the machine is not the tests' to judge.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%"},
            "nodeStatusUpdateFrequency": "5s",
        }
        if not host.one_cgroup_tree() and "v1.30." not in run(
            self._programs["kubelet"], "--version"
        ):
            kubelet["failCgroupV1"] = False
        (STATE / "kubelet.json").write_text(json.dumps(kubelet))
        for name, value in _KERNEL_PARAMETERS.items():
            path = STATE / "kernel" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")

    def _start_namespace(self) -> None:
        first = (self._packages / "usr/bin/catatonit").resolve()
        namespace = self._servers["namespace"] = _Server(
            "namespace",
            ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--propagation=private", "--pid",
             "--fork", "--mount-proc", "--kill-child=KILL",
             "sh", "-ec", _BECOME_THE_NODE, "sh", STATE, first, *host.MOUNT_POINTS],
        )  # fmt: skip

        def became() -> bool:
            assert namespace.running(), namespace.tail()
            pid = namespace.pid
            return bool(pid) and Path(f"/proc/{pid}/exe").readlink() == first

        until(became, namespace.tail)

    def _ctr(self, *arguments: str | Path) -> str:
        ctr = self._packages / "usr/bin/ctr"
        return run(*self.inside(), ctr, "--namespace=k8s.io", *arguments)

    def _containerd_serves(self) -> bool:
        try:
            self._ctr("version")
        except RuntimeError:
            return False
        return True

    def _pause_image(self) -> Path:
        def make(archive: Path) -> None:
            with TemporaryDirectory() as directory:
                shutil.copy(self._packages / "usr/bin/catatonit", Path(directory, "pause"))
                pack(archive, _PAUSE, Path(directory), command=["/pause", "-P"])

        return made_once(CACHE / "pause.tar", make)

    def _busybox_image(self) -> Path:
        def make(archive: Path) -> None:
            with TemporaryDirectory() as directory:
                programs = Path(directory, "bin")
                programs.mkdir()
                busybox = Path(shutil.copy(self._packages / "bin/busybox", programs))
                for applet in set(run(busybox, "--list").split()) - {busybox.name}:
                    (programs / applet).symlink_to(busybox.name)
                pack(archive, BUSYBOX, Path(directory), command=["sh"])

        return made_once(CACHE / "busybox.tar", make)

    def _ready(self) -> bool:
        """Node ready, and the ServiceAccount there without which no pod can be made."""
        try:
            self.plane.get("serviceaccount", "default")
            node = self.plane.get("node", NAME)
        except KubectlError:
            return False
        conditions = {one["type"]: one["status"] for one in node["status"]["conditions"]}
        return conditions.get("Ready") == "True"


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answered:
            return bool(answered.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def _clean_up() -> None:
    host.clean_up()
    shutil.rmtree(STATE, ignore_errors=True)
