"""`kubectl localmodel VERB --node NODE`: the same verbs, run in the agent's pod on that node.

The plugin needs nothing of the cluster but what kubectl can do already; it looks the pod up by its
label and node, and execs.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

from agent.cli.command import run

_SELECTOR = "app.kubernetes.io/name=localmodel-agent"
_NAMESPACE = "localmodel-system"


def run_plugin(argv: Sequence[str]) -> int:
    """Without --node, on this machine; with it, in the pod of the agent there."""
    node, namespace, rest = _split(argv)
    if node is None:
        return run(rest, program="kubectl localmodel")
    kubectl = os.environ.get("KUBECTL", "kubectl")
    on_node = ["--field-selector", f"spec.nodeName={node},status.phase=Running"]
    try:
        found = subprocess.run(
            [kubectl, "get", "pods", "-n", namespace, "-o", "name", "-l", _SELECTOR, *on_node],
            check=False,
            stdout=subprocess.PIPE,
            text=True,
        )
    except FileNotFoundError:
        print(f"error: there is no {kubectl} on the PATH", file=sys.stderr)
        return 1
    if found.returncode != 0:
        return 1  # kubectl has said why
    pods = found.stdout.split()
    if not pods:
        print(
            f"error: no agent runs on node {node!r} in namespace {namespace}\n"
            f"  see kubectl get pods -n {namespace} -l {_SELECTOR} -o wide",
            file=sys.stderr,
        )
        return 1
    terminal = ["-t"] if sys.stdout.isatty() and sys.stdin.isatty() else []
    command = [kubectl, "exec", "-i", *terminal, "-n", namespace, pods[0], "--"]
    return subprocess.run([*command, "localmodel", *rest], check=False).returncode


def _split(argv: Sequence[str]) -> tuple[str | None, str, list[str]]:
    """Take --node and --namespace out, wherever they stand."""
    taken: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, separator, value = word.partition("=")
        if name in ("--node", "--namespace"):
            taken[name] = value if separator else next(words, "")
        else:
            rest.append(word)
    return taken.get("--node"), taken.get("--namespace") or _NAMESPACE, rest
