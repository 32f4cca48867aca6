"""`kubectl localmodel`: what it asks of kubectl, word for word, and what it passes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import URI
from tests.machine import Done, Machine

_PODS = "get pods -n {namespace} -o name -l app.kubernetes.io/name=localmodel-agent"
_ON_NODE = "--field-selector spec.nodeName={node},status.phase=Running"

_FAKE = """#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "get":
    print(os.environ.get("FAKE_PODS", ""), end="")
    sys.exit(int(os.environ.get("FAKE_GET_CODE", "0")))
print("said on the node")
sys.exit(int(os.environ.get("FAKE_EXEC_CODE", "0")))
"""


class Plugin:
    """`kubectl-localmodel` with a kubectl on its PATH that notes what it was asked."""

    def __init__(self, localmodel: Machine, tmp_path: Path) -> None:
        self._log = tmp_path / "asked"
        binaries = tmp_path / "bin"
        binaries.mkdir()
        kubectl = binaries / "kubectl"
        kubectl.write_text(_FAKE.format(python=sys.executable, log=str(self._log)))
        kubectl.chmod(0o755)
        path = f"{binaries}{os.pathsep}{localmodel.environment['PATH']}"
        self._environment = {**localmodel.environment, "PATH": path}
        self._cwd = localmodel.home

    def __call__(self, *arguments: str, **environment: str) -> Done:
        code = "from agent.__main__ import kubectl_main; kubectl_main()"
        found = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=self._cwd,
            env={**self._environment, **environment},
            check=False,
        )
        return Done(found.returncode, found.stdout, found.stderr)

    @property
    def asked(self) -> list[str]:
        return [" ".join(json.loads(line)) for line in self._log.read_text().splitlines()]


@pytest.fixture
def plugin(localmodel: Machine, tmp_path: Path) -> Plugin:
    return Plugin(localmodel, tmp_path)


def test_a_verb_runs_in_the_pod_of_the_agent_on_that_node(plugin: Plugin) -> None:
    done = plugin("verify", "--all", "--node", "gpu-7", FAKE_PODS="pod/agent-x\n")
    assert (done.code, done.stdout) == (0, "said on the node\n")
    listed = _PODS.format(namespace="localmodel-system")
    assert plugin.asked == [
        f"{listed} {_ON_NODE.format(node='gpu-7')}",
        "exec -i -n localmodel-system pod/agent-x -- localmodel verify --all",
    ]


def test_node_and_namespace_may_stand_anywhere_and_the_exit_code_comes_back(
    plugin: Plugin,
) -> None:
    done = plugin(
        "--node=n1", "pull", URI, "--namespace", "mine", FAKE_PODS="pod/a\n", FAKE_EXEC_CODE="130"
    )
    assert done.code == 130
    assert plugin.asked == [
        f"{_PODS.format(namespace='mine')} {_ON_NODE.format(node='n1')}",
        f"exec -i -n mine pod/a -- localmodel pull {URI}",
    ]


def test_a_node_without_an_agent_is_named_with_where_to_look(plugin: Plugin) -> None:
    done = plugin("ls", "--node", "gpu-7")
    assert done.code == 1
    assert "no agent runs on node 'gpu-7'" in done.stderr
    assert "kubectl get pods -n localmodel-system" in done.stderr


def test_a_kubectl_that_fails_or_is_missing_ends_it(plugin: Plugin) -> None:
    assert plugin("ls", "--node", "x", FAKE_GET_CODE="7").code == 1
    done = plugin("ls", "--node", "x", KUBECTL="no-such-kubectl")
    assert done.code == 1
    assert "no-such-kubectl" in done.stderr


def test_without_a_node_it_is_the_command_of_this_machine(
    plugin: Plugin, localmodel: Machine
) -> None:
    done = plugin("ls", "-o", "json", "--root", str(localmodel.root))
    assert (done.code, done.json) == (0, [])
