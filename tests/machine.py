"""One machine for a test: the real command in real processes, its agent, its disk.

Nothing is faked here but the hub. Waiting is polling a condition with a deadline, and no process
outlives its `Machine`: each is ended by its own number.
"""

import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from unittest.mock import patch

from prometheus_client.parser import text_string_to_metric_families

from agent import layout
from agent.cli import run
from agent.model import CacheKey, cache_key
from tests import leaks

_T = TypeVar("_T")

REPOSITORY = Path(__file__).parent.parent
DEADLINE = 30.0
"""Seconds that anything expected may take on a busy machine."""


def until(
    condition: Callable[[], _T], what: str | Callable[[], object] = "", *, seconds: float = DEADLINE
) -> _T:
    """Poll until the condition holds; its value. `what` explains a failure."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            said = what() if callable(what) else what
            raise AssertionError(f"not within {seconds:g} s: {said or condition}")
        time.sleep(0.02)
    return value


@dataclass(frozen=True, slots=True)
class Done:
    """A command that ended."""

    code: int
    stdout: str
    stderr: str

    def __post_init__(self) -> None:
        leaks.check("what a command printed", f"{self.stdout}{self.stderr}")

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    def ok(self) -> "Done":
        assert self.code == 0, self
        return self


class Command:
    """A command that runs, in a process group of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    @property
    def pid(self) -> int:
        return self.process.pid

    def running(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def done(self, seconds: float = DEADLINE) -> Done:
        stdout, stderr = self.process.communicate(timeout=seconds)
        return Done(self.process.returncode, stdout, stderr)

    def kill(self) -> None:
        if self.running():
            self.process.kill()
        self.process.communicate()


class Server:
    """A running process of ours: its log, its port of metrics and probes, and its end."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> list[dict[str, Any]]:
        # The last line may be half written.
        lines = self._log.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines if line.startswith("{")]

    def log_text(self) -> str:
        return self._log.read_text()

    def said(self, text: str) -> list[str]:
        return [line["message"] for line in self.log() if text in line["message"]]

    @functools.cached_property
    def port(self) -> int:
        """As the log says: it was asked to choose one."""

        def bound() -> int:
            assert self.process.poll() is None, self.log_text()
            found = self.said("metrics on 127.0.0.1:")
            return int(found[0].rpartition(":")[2]) if found else 0

        return until(bound, self.log_text)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as page:
                return page.status, page.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        """By sample name with its label values: `localmodel_requests_total hit`."""
        _, text = self.get("/metrics")
        return {
            " ".join((sample.name, *(value for _, value in sorted(sample.labels.items())))): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def stop(self, number: int = signal.SIGTERM, *, seconds: float = 10.0) -> int:
        """End it as kubelet does; its exit code. Fails if it takes longer than a pod has."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Agent(Server):
    """A running `localmodel agent`."""

    def __init__(self, machine: "Machine", process: subprocess.Popen[bytes], log: Path) -> None:
        super().__init__(process, log)
        self.machine = machine

    def wait_ready(self) -> "Agent":
        """Until the first turn is over and the socket is there."""
        until(lambda: self.get("/readyz")[0] == 200, self.log_text)
        until((self.machine.state / layout.SOCKET).exists, self.log_text)
        return self

    def status(self, name: str) -> dict[str, Any]:
        """The status of one cache; empty while there is none."""
        try:
            text = (self.machine.status_directory / f"{name}.json").read_text()
        except FileNotFoundError:
            return {}
        found: dict[str, Any] = json.loads(text)
        return found

    def wait_state(self, name: str, state: str, *, reason: str | None = None) -> dict[str, Any]:
        def reached() -> dict[str, Any]:
            assert self.process.poll() is None, self.log_text()
            found = self.status(name)
            as_wanted = found.get("state") == state and reason in (None, found.get("reason"))
            return found if as_wanted else {}

        return until(reached, lambda: f"{self.status(name)}\n{self.log_text()}")


class Machine:
    """One cache directory, one desired directory, and an environment without surprises."""

    def __init__(self, home: Path, endpoint: str = "") -> None:
        self.home = home
        self.root = home / "cache"
        self.state = self.root / layout.STATE
        self.desired = home / "desired"
        self.status_directory = self.desired / "status"
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(home / "home"),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": leaks.TOKEN,
            **({"HF_ENDPOINT": endpoint} if endpoint else {}),
        }
        (home / "home").mkdir(parents=True)
        self.desired.mkdir()
        self._commands: list[Command] = []
        self._agents: list[Agent] = []
        self._logs: list[IO[bytes]] = []

    # -- the command --------------------------------------------------------------------------

    def argv(self, *arguments: str, root: Path | None = None) -> list[str]:
        verb, *rest = arguments
        return [sys.executable, "-m", "agent", verb, "--root", str(root or self.root), *rest]

    def start(
        self,
        *arguments: str,
        root: Path | None = None,
        environment: Mapping[str, str] | None = None,
        under: Sequence[str] = (),
        **options: Any,
    ) -> Command:
        """Start a verb, under another command if one is given; `options` are Popen's."""
        process: subprocess.Popen[str] = subprocess.Popen(
            [*under, *self.argv(*arguments, root=root)],
            stdin=subprocess.DEVNULL,
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=options.pop("stderr", subprocess.PIPE),
            text=True,
            cwd=self.home,
            env={**self.environment, **(environment or {})},
            **options,
        )
        command = Command(process)
        self._commands.append(command)
        return command

    def __call__(
        self,
        *arguments: str,
        root: Path | None = None,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Done:
        """Run a verb to its end."""
        return self.start(*arguments, root=root, environment=environment, **options).done()

    def inline(self, *arguments: str, environment: Mapping[str, str] | None = None) -> Done:
        """Run a verb in this process: the same command without the second that Python takes."""
        stdout, stderr = io.StringIO(), io.StringIO()
        with (
            patch.dict(os.environ, {**self.environment, **(environment or {})}, clear=True),
            redirect_stdout(stdout),
            redirect_stderr(stderr),
        ):
            try:
                code = run(self.argv(*arguments)[3:])
            except SystemExit as ended:  # argparse's
                code = int(ended.code or 0)
        return Done(code, stdout.getvalue(), stderr.getvalue())

    # -- the agent ----------------------------------------------------------------------------

    def agent(
        self,
        *flags: str,
        root: Path | None = None,
        desired: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Agent:
        """Start the agent on a port of its own choice; `wait_ready` waits for it.

        An environment that names a node makes it that node's agent, without a desired directory.
        """
        environment = {**self.environment, **(environment or {})}
        path = self.home / f"agent-{len(self._agents)}.log"
        log = path.open("wb")
        self._logs.append(log)
        wishes = () if "NODE_NAME" in environment else ("--desired", str(desired or self.desired))
        arguments = ("agent", *wishes, *flags)
        process = subprocess.Popen(
            [*self.argv(*arguments, root=root), "--listen", "127.0.0.1:0"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=self.home,
            env=environment,
        )
        agent = Agent(self, process, path)
        self._agents.append(agent)
        return agent

    def want(self, name: str, uri: str, *, file: str | None = None, **annotations: str) -> Path:
        """Write a LocalModelCache into the desired directory, at once as `kubectl` would."""
        path = self.desired / (file or f"{name}.yaml")
        replace(path, cache_yaml(name, uri, **annotations))
        return path

    # -- the disk -----------------------------------------------------------------------------

    def model(self, uri: str) -> Path:
        return self.root / layout.model(cache_key(uri))

    def sealed(self) -> set[CacheKey]:
        """The keys on offer: those with a manifest."""
        manifests = self.root / layout.MANIFESTS
        if not manifests.is_dir():
            return set()
        return {CacheKey(path.name) for path in manifests.iterdir() if layout.is_key(path.name)}

    def check_offers(self, keys: Iterable[CacheKey] | None = None) -> None:
        """Every model on offer is, byte for byte, what its manifest says; coreutils is judge."""
        for key in self.sealed() if keys is None else self.sealed().intersection(keys):
            checked = subprocess.run(
                ["sha256sum", "--check", "--quiet", "--strict", self.root / layout.manifest(key)],
                cwd=self.root / layout.model(key),
                capture_output=True,
                text=True,
                check=False,
            )
            assert checked.returncode == 0, f"{key}: {checked.stdout}{checked.stderr}"

    # -- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """End what still runs; then say what an agent complained of that no test expects."""
        for command in self._commands:
            with suppress(ValueError):  # its pipes were read to their end already
                command.kill()
        witnessed = [agent for agent in self._agents if agent.process.poll() is None]
        try:
            for agent in witnessed:
                illegal = agent.metrics().get("localmodel_illegal_transitions_total")
                assert illegal == 0, agent.log_text()
                leaks.check("/metrics", agent.get("/metrics")[1])
        finally:
            for agent in self._agents:
                if agent.process.poll() is None:
                    agent.kill()
            for log in self._logs:
                log.close()
        for agent in self._agents:
            text = agent.log_text()
            assert "Traceback" not in text, text
            assert "never retrieved" not in text, text
            assert "illegal change" not in text, text
            leaks.check("an agent's log", text)
        leaks.check_files(self.root / layout.HIDDEN)
        leaks.check_files(self.status_directory)


@contextmanager
def machine(home: Path, endpoint: str = "") -> Iterator[Machine]:
    made = Machine(home, endpoint)
    try:
        yield made
    finally:
        made.close()


def replace(path: Path, text: str) -> None:
    """Write a file so that nobody ever reads half of it."""
    aside = path.with_name(f".{path.name}.aside")
    aside.write_text(text)
    aside.replace(path)


def cache_yaml(name: str, uri: str, **annotations: str) -> str:
    """A LocalModelCache; annotations by their name behind our prefix, `_` for `-`."""
    notes = {
        f"localmodel-agent.io/{key.replace('_', '-')}": value for key, value in annotations.items()
    }
    body = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LocalModelCache",
        "metadata": {"name": name, **({"annotations": notes} if notes else {})},
        "spec": {"sourceModelUri": uri, "modelSize": "1Gi", "nodeGroups": ["gpu"]},
    }
    return json.dumps(body, indent=1)  # which is YAML


def files_of(root: Path) -> dict[str, bytes]:
    """Every file below a directory, by its relative path. Of no file, where another directory takes
    its place while this looks: who waits for that asks again."""
    try:
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }
    except FileNotFoundError:
        return {}


def everything_in(root: Path, *, but: Sequence[Path] = ()) -> set[str]:
    """The names of all there is below a directory, except below some: nothing may be added."""
    found = set()
    for directory, directories, names in os.walk(root):
        directories[:] = [name for name in directories if Path(directory, name) not in but]
        found |= {str(Path(directory, name)) for name in (*names, *directories)}
    return found
