"""The command line: `localmodel agent` and the operator's verbs.

    command      the parser, and which function a verb is
    session      the verbs' way to a volume: a running agent's socket, or the disk itself
    verbs        pull, ls, show, verify: events in, text and exit code out
    housekeeping plan, why, pin, unpin, evict
    doctor       what this machine has, and lacks
    render       sizes, times, tables; rich where a human looks, plain text where not
    kubectl      the same verbs through `kubectl exec`

Exit codes: 0 it is so, 1 it is not (failed, or bad files found), 2 the request makes no sense.
"""

from agent.cli.command import run

__all__ = ["run"]
