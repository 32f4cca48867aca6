"""The ways to get a verified model that are compared, each as its users run it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from bench.origin import REPOSITORY, Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run. `digests` prove that it was one. Memory is resident, of the largest process."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    digests: Mapping[str, str]
    idle_bytes: int = 0


class Peer(Protocol):
    name: str

    def run(self, origin: Origin, work: Path) -> Result: ...


class Ours:
    """A pull through the socket of an agent that runs already."""

    name = "localmodel"

    def run(self, origin: Origin, work: Path) -> Result:
        root = work / "cache"
        command = [sys.executable, "-m", "agent", "agent", "--root", str(root)]
        running = subprocess.Popen(
            [*command, "--listen", "127.0.0.1:0"],
            env=_environment(origin),
            stderr=subprocess.DEVNULL,
        )
        try:
            socket = root / ".localmodel" / "state" / "agent.sock"
            while not socket.exists():
                time.sleep(0.05)
            time.sleep(0.5)
            process = psutil.Process(running.pid)
            idle, before = process.memory_info().rss, _cpu(process)
            result = _ask(socket, f"hf://{REPOSITORY}")
            return Result(
                seconds=result["seconds"],
                cpu_seconds=_cpu(process) - before,
                peak_bytes=_peak(running.pid),
                idle_bytes=idle,
                digests=_digests(root / ".localmodel" / "manifests" / result["key"]),
            )
        finally:
            running.terminate()
            running.wait(15)


class Curl:
    """curl, then openssl over what it wrote."""

    name = "curl + openssl dgst -sha256"

    def run(self, origin: Origin, work: Path) -> Result:
        return _script(
            origin,
            work,
            """
            transfers = [word for name in names for word in ("-o", name, url(name))]
            subprocess.run(["curl", "-sSfL", "--create-dirs", *transfers], check=True)
            """,
        )


class HuggingFaceHub:
    """huggingface_hub's own downloader (plain HTTPS), then the same digest."""

    name = "huggingface_hub + the same digest"

    def run(self, origin: Origin, work: Path) -> Result:
        return _script(
            origin,
            work,
            """
            snapshot_download(repository, local_dir=".")
            """,
            imports="from huggingface_hub import snapshot_download",
        )


def peers() -> list[Peer]:
    return [Ours(), *([Curl()] if shutil.which("curl") else []), HuggingFaceHub()]


_TEMPLATE = """
import json, resource, subprocess, sys, time
{imports}
endpoint, repository, *names = json.load(sys.stdin)
url = lambda name: f"{{endpoint}}/{{repository}}/resolve/main/{{name}}"
begun = time.monotonic()
{body}
out = subprocess.run(["openssl", "dgst", "-sha256", "-r", *names], check=True, stdout=-1, text=True)
seconds = time.monotonic() - begun
usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({{
    "seconds": seconds,
    "cpu_seconds": sum(u.ru_utime + u.ru_stime for u in usage),
    "peak_bytes": max(u.ru_maxrss for u in usage) * 1024,
    "digests": {{l.split(" *", 1)[1]: l.split(" ")[0] for l in out.stdout.splitlines()}},
}}))
"""


def _script(origin: Origin, work: Path, body: str, imports: str = "") -> Result:
    """Run a peer in a small Python of its own, so that its CPU and memory are its own."""
    code = _TEMPLATE.format(
        imports=imports, body="\n".join(line.strip() for line in body.splitlines())
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([origin.endpoint, REPOSITORY, *origin.shape.files]),
        env=_environment(origin),
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return Result(**json.loads(found.stdout))


def _environment(origin: Origin) -> dict[str, str]:
    return {
        **os.environ,
        "HF_ENDPOINT": origin.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }


def _ask(socket: Path, uri: str) -> dict[str, Any]:
    """The last event of a pull: what `localmodel pull -o json` prints."""
    body = ["-H", "Content-Type: application/json", "-d", json.dumps({"uri": uri})]
    found = subprocess.run(
        ["curl", "-sS", "--unix-socket", str(socket), "http://agent/v1/pull", *body],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    event = json.loads(found.stdout.splitlines()[-1])
    if event["event"] != "result":
        sys.exit(f"error: {event}")
    return dict(event)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _peak(pid: int) -> int:
    """The kernel's own high-water mark: sampling would miss it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no VmHWM")


def _digests(manifest: Path) -> dict[str, str]:
    lines = [line for line in manifest.read_text().splitlines() if not line.startswith("#")]
    return {path: digest for digest, _, path in (line.partition("  ") for line in lines)}
