"""The page of `sh` that a wrapped storage initializer runs instead of its own entrypoint (D8).

For each `URI DESTINATION` of its arguments: where this node's cache has the model, its files become
symlinks in the destination, which takes milliseconds; while the agent says that it brings it, wait
and say how far it is. Whatever is odd, refused, silent or late, the original entrypoint runs with
the pairs that are still missing: a pod starts as it would have without us.

It is read in the pod's spec by whoever wonders, so it holds its own explanation, and no more than
the shells of dash, busybox and bash have in common. It runs as any user, without a writable root.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agent import layout
from agent.model import CacheKey

SILENT_SECONDS = 30
"""An agent that has not even said that it begins: none is there, or nobody asked it to."""

STILL_SECONDS = 60
"""A counter that does not move: the agent died. It writes at least every ten seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One `URI DESTINATION` that the cache can serve: `rest` is what of the cached model it is.

    `cached` is the URI of the cache, which the manifest must name; `uri` is the initializer's own.
    """

    uri: str
    key: CacheKey
    cached: str
    rest: str = ""


def command(
    pairs: Sequence[Pair], *, root: str, limit_seconds: int, entrypoint: Sequence[str]
) -> list[str]:
    """The container's `command`; its `args` stay as they are. `root` is where the cache is mounted,
    `limit_seconds` how long to wait at most for all pairs together."""
    known = "\n".join(
        f"{_case(pair.uri)}{pair.key} cached={shlex.quote(pair.cached)}"
        f" rest={shlex.quote(pair.rest)} ;;"
        for pair in pairs
    )
    words = {
        "ROOT": shlex.quote(root),
        "LIMIT": str(limit_seconds),
        "SILENT": str(SILENT_SECONDS),
        "STILL": str(STILL_SECONDS),
        "MODELS": layout.MODELS,
        "MANIFESTS": layout.MANIFESTS,
        "PROGRESS": layout.PROGRESS,
        "ENTRYPOINT": shlex.join(entrypoint),
        "KNOWN": known,
    }
    # In one pass: a URI or an entrypoint may hold any of these names.
    script = re.sub("@([A-Z]+)@", lambda found: words[found[1]], _SCRIPT)
    return [*_SHELL, script, _NAME]


def served(command: Sequence[object], uris: Iterable[str]) -> frozenset[str]:
    """Those that a container's `command` takes from the cache; none, if it is no page of ours."""
    if len(command) != 4 or [*command[:2], command[3]] != [*_SHELL, _NAME]:
        return frozenset()
    page = str(command[2])
    return frozenset(uri for uri in uris if f"\n{_case(uri)}" in page)


def _case(uri: str) -> str:
    return f"    {shlex.quote(uri)}) key="


_SHELL, _NAME = ["sh", "-c"], "localmodel"


_SCRIPT = """\
# localmodel-agent: take models from this node's cache, else run the original entrypoint.
root=@ROOT@ left=@LIMIT@
say() { printf "localmodel: %s\\n" "$*"; }

known() { # URI: sets key, cached and rest, if it is one of the cache's
    case $1 in
@KNOWN@
    *) return 1 ;;
    esac
}

offered() { # whether the cache offers this model; its manifest names it
    [ -d "$root/@MODELS@/$key" ] && [ -r "$root/@MANIFESTS@/$key" ] || return 1
    while IFS= read -r line; do
        case $line in
        "# uri $cached") return 0 ;;
        '#'*) ;;
        *) return 1 ;;
        esac
    done <"$root/@MANIFESTS@/$key"
    return 1
}

wait_for() { # URI: until the cache offers it; fails when there is nothing to wait for
    silent=0 still=0 last=''
    until offered; do
        verb='' counter='' have=0 total=0 reason=''
        if [ -r "$root/@PROGRESS@/$key" ]; then
            read -r verb counter have total reason <"$root/@PROGRESS@/$key" || :
            silent=0
        else
            silent=$((silent + 1))
        fi
        if [ "$verb" = fallback ]; then say "$1: the cache cannot bring it: $reason"; return 1; fi
        if [ "$silent" -ge @SILENT@ ]; then say "$1: no agent answers on this node"; return 1; fi
        if [ "$counter" = "$last" ]; then still=$((still + 1)); else still=0; fi
        if [ "$still" -ge @STILL@ ]; then say "$1: the agent of this node is silent"; return 1; fi
        if [ "$left" -le 0 ]; then say "$1: waited long enough"; return 1; fi
        [ "$counter" = "$last" ] || say "$1: waiting, $have of $total bytes ($reason)"
        last=$counter left=$((left - 1))
        sleep 1
    done
}

emptied() { # DEST: takes links into the cache out of it; fails if there is anything else
    others=0
    for found in "$1"/* "$1"/.[!.]* "$1"/..?*; do
        [ -L "$found" ] || [ -e "$found" ] || continue # the pattern itself: nothing matched
        case $(readlink "$found") in "$root"/*) rm -f "$found" || others=1 ;; *) others=1 ;; esac
    done
    return "$others"
}

packed() { # FILE...: whether it is one archive, which the original would unpack
    one=''
    for file in "$@"; do
        [ -e "$file" ] || continue
        [ -z "$one" ] || return 1
        one=$file
    done
    case $one in
    *.[tT][aA][rR] | *.[tT][aA][rR].* | *.[tT][bBgGxX][zZ]* | *.[zZ][iI][pP]) [ -f "$one" ] ;;
    *) return 1 ;;
    esac
}

links() { # DEST: the files of the model, or the one that was asked for
    from=$root/@MODELS@/$key${rest:+/$rest}
    [ -e "$from" ] && mkdir -p "$1" && emptied "$1" || return 1
    if [ -f "$from" ]; then set -- "$1" "$from"; else
        set -- "$1" "$from"/* "$from"/.[!.]* "$from"/..?*
    fi
    to=$1
    shift
    if [ -n "$rest" ] && packed "$@"; then return 1; fi
    for file in "$@"; do
        [ -e "$file" ] || continue
        ln -s "$file" "$to/${file##*/}" || return 1
    done
    offered # still: nothing was taken away meanwhile
}

trap 'exit 143' TERM # the first process of a container hears of no signal that it does not ask for
pairs=$#
while [ "$pairs" -gt 1 ]; do # what could not be linked goes back to the end of the arguments
    if known "$1" && wait_for "$1" && links "$2"; then
        say "$1 is at $2, from this node's cache"
    else
        emptied "$2" # of what an earlier run left: the original cannot write through a link
        set -- "$@" "$1" "$2"
    fi
    shift 2
    pairs=$((pairs - 2))
done
[ $# -gt 0 ] || exit 0
say "runs the original entrypoint for: $*"
exec @ENTRYPOINT@ "$@"
"""
