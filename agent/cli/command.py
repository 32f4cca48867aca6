"""The parser, and which function a verb is."""

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

from agent import __version__
from agent.cli import housekeeping, verbs
from agent.cli.doctor import doctor
from agent.config import ControllerSettings, Settings, add_flags, read, unify_ca_variables
from agent.errors import AgentError, Reason
from agent.events import error_event

_Verb = Callable[[Settings, argparse.Namespace], Coroutine[Any, Any, int]]


def run(argv: Sequence[str], *, program: str = "localmodel") -> int:
    """Run one command; its exit code."""
    arguments = parser(program).parse_args(argv)
    unify_ca_variables(os.environ)
    try:
        settings = read(vars(arguments), os.environ, arguments.of)
        code: int = asyncio.run(arguments.verb(settings, arguments))
        print(end="", flush=True)  # here, where a reader that went away is expected
    except AgentError as error:
        return verbs.failed(error_event(error), arguments)
    except KeyboardInterrupt:
        print("interrupted; what was downloaded is kept for the next time", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`| head`). Python would complain once more while closing stdout.
        _close_output()
        return 1
    except OSError as error:  # of the output: all others have a reason
        _close_output()
        print(f"error: cannot write the output: {error.strerror or error}", file=sys.stderr)
        return 1
    return code


def _close_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser(program: str = "localmodel") -> argparse.ArgumentParser:
    """The whole command line. docs/cli.md is generated from it."""
    top = argparse.ArgumentParser(
        prog=program,
        description="A model cache for one machine: downloads once, proves every byte.",
    )
    top.add_argument("--version", action="version", version=f"localmodel {__version__}")
    top.set_defaults(of=Settings)
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    agent = commands.add_parser(
        "agent",
        help="run the node agent until it is told to stop",
        description="Run the node agent until it is told to stop (SIGTERM).",
    )
    add_flags(agent)
    agent.set_defaults(verb=_agent)

    controller = commands.add_parser(
        "controller",
        help="run the admission hook, and keep its claims, until it is told to stop",
        description="Run the admission hook, and keep the claims that it gives to pods, until it is"
        " told to stop (SIGTERM). docs/hook.md says what it does with a pod.",
    )
    add_flags(controller, of=ControllerSettings)
    controller.set_defaults(verb=_controller, of=ControllerSettings)

    prepare = commands.add_parser(
        "prepare",
        help="make the cache's directories and give them to the agent (as root, before it)",
        description="Make the cache's directories and give them to the agent. Needs root, or"
        " CHOWN, FOWNER and DAC_OVERRIDE.",
    )
    prepare.add_argument("--owner", metavar="UID[:GID]", default="64000:64000", help=_OWNER)
    prepare.add_argument("--adopt", action="store_true", help=_ADOPT)
    add_flags(prepare, "root", "state", "require_dedicated")
    prepare.set_defaults(verb=_prepare, output="table")

    pull = _verb(commands, "pull", "have a model here, now", verbs.pull)
    pull.add_argument(
        "uri",
        help="hf://owner/name[:revision][/path], s3://, gs://, https://, or a path",
    )
    pull.add_argument("--include", action="append", default=[], metavar="GLOB", help=_INCLUDE)
    pull.add_argument("--exclude", action="append", default=[], metavar="GLOB", help=_EXCLUDE)
    pull.add_argument(
        "--expect-fingerprint",
        metavar="sha256:HEX",
        help="publish only exactly these bytes (as `localmodel show` tells)",
    )
    limits = ("high", "low", "limit", "min_age", "retain")
    add_flags(pull, "connections", "max_rate", "stall_seconds", "file_policy", *limits)

    _verb(commands, "ls", "the models here", verbs.ls)

    show = _verb(commands, "show", "one model, with its files", verbs.show)
    show.description = _SHOW
    show.add_argument("model", help=_NAMED)

    verify = _verb(commands, "verify", "read and hash models again", verbs.verify)
    verify.add_argument("models", nargs="*", metavar="MODEL", help=_MODEL)
    verify.add_argument("--all", action="store_true", help="every model on offer")
    verify.add_argument(
        "--repair", action="store_true", help="fetch the bad files again, and only those"
    )
    plan = _verb(commands, "plan", "would it fit, and what would go for it", housekeeping.plan)
    plan.add_argument("model", metavar="URI|SIZE", help="a URI, or a size as 140Gi")
    add_flags(plan, *limits)

    why = _verb(commands, "why", "why a model is here, or not", housekeeping.why)
    why.add_argument("model", help=_NAMED)

    for name, text, verb in (
        ("pin", "keep a model, whatever room is needed", housekeeping.pin),
        ("unpin", "keep it no longer than others", housekeeping.unpin),
    ):
        _verb(commands, name, text, verb).add_argument("model", help=_NAMED)

    evict = _verb(commands, "evict", "take models away that nothing keeps", housekeeping.evict)
    evict.add_argument("models", nargs="+", metavar="MODEL", help=_NAMED)
    evict.add_argument("--dry-run", action="store_true", help="say what would go, and free")

    found = _verb(commands, "doctor", "what this machine has, and lacks, for a cache", doctor)
    add_flags(found, "require_dedicated", "high", "low", "limit")
    return top


_SHOWN = 20
_OWNER = "who the agent runs as, in numbers (default: 64000:64000, the image's user)"
_ADOPT = "also give it what another agent left in models/KEY: the files are proven and taken over"
_INCLUDE = "only files that match (`*` crosses `/`); may be given again"
_EXCLUDE = "no files that match; may be given again"
_MODEL = "a URI, or a key or the beginning of one"
_NAMED = f"{_MODEL}; while an agent runs also the name of a cache, or NAMESPACE/NAME"
_SHOW = (
    "One model, with its files. With -o json, modelmesh.GROUP is what a ModelMesh InferenceService"
    " says under spec.predictor.model to read it from the claim of that node group: {storage:"
    " {parameters: {type: pvc, name: localmodel-GROUP}, path: models/KEY}} (ModelMesh mounts claims"
    " that its storage-config names, or any with allowAnyPVC). There is one for each"
    " node group that asks for the model, and no modelmesh where none is known (without an agent"
    " that runs for a node of a cluster)."
)


def _verb(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    text: str,
    verb: _Verb,
) -> argparse.ArgumentParser:
    found = commands.add_parser(name, help=text, description=text)
    found.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="default: table"
    )
    add_flags(found, "root", "state")
    found.set_defaults(verb=verb)
    return found


async def _agent(settings: Settings, arguments: argparse.Namespace) -> int:
    # Only the agent needs the server and the loop's logging; a verb must start fast.
    from agent.app import run_agent

    log_to_stderr()
    await run_agent(settings)
    return 0


async def _controller(settings: ControllerSettings, arguments: argparse.Namespace) -> int:
    from agent.controller import run_controller

    log_to_stderr()
    await run_controller(settings)
    return 0


async def _prepare(settings: Settings, arguments: argparse.Namespace) -> int:
    from agent.prepare import parse_owner, prepare

    owner = parse_owner(arguments.owner)
    try:
        refused = prepare(
            settings.root,
            settings.state_directory,
            owner,
            require_dedicated=settings.require_dedicated,
            adopt=arguments.adopt,
        )
        for line in refused[:_SHOWN]:
            print(f"warning: {line}", file=sys.stderr)
        if len(refused) > _SHOWN:
            print(f"warning: and {len(refused) - _SHOWN} more", file=sys.stderr)
    except AgentError as error:
        if error.reason is not Reason.DISK_MISSING:
            raise
        # The agent is to start all the same: it says so where people look, and waits for the disk.
        print(f"warning: {error.message}; nothing was made", file=sys.stderr)
    return 0


def log_to_stderr() -> None:
    """JSON lines with fixed fields, as a log pipeline reads them."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for chatty in ("httpx2", "httpcore2", "aiohttp.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        for name in ("key", "state", "reason", "bytes"):
            if (value := getattr(record, name, None)) not in (None, ""):
                line[name] = value
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)
