"""pull, ls, show, verify: events in, text and an exit code out."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any

from agent import layout
from agent.catalog import Catalog
from agent.cli.render import bar, error_text, print_json, size, table
from agent.cli.session import changing, reading
from agent.config import Settings
from agent.errors import Reason
from agent.events import Event, is_named
from agent.model import claim_name

_BAD_REQUEST = frozenset(
    reason.value for reason in (Reason.INVALID_SPEC, Reason.UNSUPPORTED, Reason.CONFLICT)
)

# What `ls -o json` promises to have; the rest of an event is in `show`.
_LISTED = (
    "key",
    "uri",
    "revision",
    "bytes",
    "downloaded_bytes",
    "state",
    "reason",
    "message",
    "last_used",
    "fingerprint",
)


# Of no effect where a running agent does the work.
_OF_THE_AGENT = (
    *("connections", "max_rate", "stall_seconds", "file_policy"),
    *("high", "low", "limit", "min_age", "retain"),
)


def exit_code(event: Mapping[str, Any]) -> int:
    """Of an `error` event: 2 when the request itself makes no sense, else 1."""
    return 2 if event["reason"] in _BAD_REQUEST else 1


async def pull(settings: Settings, arguments: argparse.Namespace) -> int:
    request = {
        "uri": arguments.uri,
        "include": arguments.include,
        "exclude": arguments.exclude,
        "expect_fingerprint": arguments.expect_fingerprint,
    }
    async with changing(settings) as session:
        own = [name for name in _OF_THE_AGENT if name in vars(arguments)]
        if session.remote and own:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in own)
            print(f"warning: an agent runs here, and goes by its own {flags}", file=sys.stderr)
        with bar() as shown:
            async with aclosing(session.pull(request)) as events:
                async for event in events:
                    if event["event"] == "progress":
                        shown.show(event)
        return _pulled(event, arguments)


def _pulled(event: Event, arguments: argparse.Namespace) -> int:
    if event["event"] == "error":
        return failed(event, arguments)
    if arguments.output == "json":
        print_json({name: value for name, value in event.items() if name != "event"})
        return 0
    seconds, received = event["seconds"], event["downloaded_bytes"]
    rate = f", {size(int(received / seconds))}/s" if received and seconds else ""
    how = f"{size(received)} in {seconds:.1f} s{rate}" if received else f"{seconds:.1f} s"
    if event["linked_bytes"]:
        how += f"; {size(event['linked_bytes'])} were here already"
    if event["warning"]:
        print(f"warning: {event['warning']}", file=sys.stderr)
    print(f"{event['result']}  {event['uri']}  ({how})")
    print(f"{event['files']} files, {size(event['bytes'])}, {event['fingerprint']}")
    print(event["path"])
    return 0


async def ls(settings: Settings, arguments: argparse.Namespace) -> int:
    models = await _models(settings)
    if arguments.output == "json":
        print_json([{name: model[name] for name in _LISTED} for model in models])
        return 0
    rows = [
        (
            model["key"],
            model["state"],
            _amount(model),
            model["revision"][:12] or "-",
            model["last_used"] or "-",
            model["uri"],
        )
        for model in models
    ]
    print(table(("KEY", "STATE", "SIZE", "REVISION", "LAST USED", "URI"), rows))
    return 0


def _amount(model: Event) -> str:
    total, done = model["bytes"], model["downloaded_bytes"]
    return size(total) if done == total else f"{size(done)} of {size(total)}"


async def _models(settings: Settings) -> list[Event]:
    async with reading(settings) as session, aclosing(session.models()) as events:
        return [{k: v for k, v in event.items() if k != "event"} async for event in events]


async def show(settings: Settings, arguments: argparse.Namespace) -> int:
    wanted = arguments.model
    models = [
        model
        for model in await _models(settings)
        if is_named(wanted, model["key"], model["uri"], model["names"])
    ]
    if len(models) != 1:
        problem = "is not here" if not models else f"means {len(models)} models"
        message = f"{wanted[:200]!r} {problem}"
        event = {"reason": "InvalidSpec", "message": message, "advice": "see localmodel ls"}
        return failed(event, arguments)
    model = models[0]
    found = Catalog(settings.root).manifest(model["key"])
    files = [
        {
            "path": file.path,
            "bytes": file.size,
            "sha256": file.sha256,
            "promised": str(file.promised) if file.promised else None,
        }
        for file in (found.files if found else ())
    ]
    claims = _claims(model)
    if arguments.output == "json":
        print_json(
            {
                **model,
                **({"modelmesh": claims} if claims else {}),
                "include": list(found.ref.include) if found else [],
                "exclude": list(found.ref.exclude) if found else [],
                "file_list": files,
            }
        )
        return 0
    _print_model(model, files)
    return 0


def _claims(model: Event) -> dict[str, Any]:
    """By node group, what a ModelMesh InferenceService says to read the model from its claim."""
    path = layout.model(model["key"])
    return {
        group: {"storage": {"parameters": {"type": "pvc", "name": claim_name(group)}, "path": path}}
        for group in model["groups"]
    }


def _print_model(model: Event, files: Sequence[Mapping[str, Any]]) -> None:
    shown = {name: _text(value) for name, value in model.items() if value not in ("", 0, [])}
    for claim in _claims(model).values():
        where = claim["storage"]
        shown[f"claim {where['parameters']['name']}"] = where["path"]
    width = max(map(len, shown))
    for name, text in shown.items():
        print(f"{name.ljust(width)}  {text}")
    if files:
        rows = [
            (file["sha256"][:16], size(file["bytes"]), (file["promised"] or "-")[:24], file["path"])
            for file in files
        ]
        print()
        print(table(("SHA256", "SIZE", "PROMISED", "FILE"), rows))


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


async def verify(settings: Settings, arguments: argparse.Namespace) -> int:
    if arguments.all == bool(arguments.models):
        print("error: name the models to verify, or --all", file=sys.stderr)
        return 2
    request = {"models": None if arguments.all else arguments.models, "repair": arguments.repair}
    async with changing(settings) if arguments.repair else reading(settings) as session:
        events = []
        async with aclosing(session.verify(request)) as stream:
            async for event in stream:
                events.append(event)
                if arguments.output == "table":
                    _print_verified(event)
    if arguments.output == "json":
        print_json([_without_empty(event) for event in events])
    codes = [exit_code(event) for event in events if event["event"] == "error"]
    bad = any(event.get("bad") for event in events)
    return max(codes, default=int(bad))


def _print_verified(event: Event) -> None:
    match event["event"]:
        case "error":
            print(error_text(event), file=sys.stderr)
        case "repaired":
            print(f"repaired  {event['uri']}: {', '.join(event['repaired'])}")
        case _ if event["bad"]:
            print(f"bad       {event['uri']}: {', '.join(event['bad'])}")
        case _:
            print(f"ok        {event['uri']} ({event['files']} files, {size(event['bytes'])})")


def _without_empty(event: Event) -> Event:
    return {name: value for name, value in event.items() if value != ""}


def failed(event: Mapping[str, Any], arguments: argparse.Namespace) -> int:
    """Print an `error` event; the exit code."""
    if getattr(arguments, "output", "table") == "json":  # the agent has no such flag
        print_json({name: value for name, value in event.items() if name != "event"})
    print(error_text(event), file=sys.stderr)
    return exit_code(event)
