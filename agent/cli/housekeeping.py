"""plan, why, pin, unpin, evict: events in, text and an exit code out."""

import argparse
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from agent.cli.render import print_json, size, table
from agent.cli.session import changing
from agent.cli.verbs import exit_code, failed
from agent.config import Settings
from agent.events import Event


async def plan(settings: Settings, arguments: argparse.Namespace) -> int:
    """Exit code 1 where it does not fit."""
    return await _one(settings, arguments, "plan", {"model": arguments.model}, _planned)


def _planned(event: Event) -> int:
    what = event["uri"] or "it"
    if event["here"]:
        print(f"{what} is here already")
    elif event["fits"]:
        going = event["evicts"]
        for_it = f", {len(going)} would go for it" if going else ", nothing would go for it"
        print(f"{what} fits: {size(event['bytes'])}{for_it}")
    else:
        print(f"{what} does not fit: {event['message']}")
    if event["evicts"]:
        rows = [(gone["key"], size(gone["bytes"]), gone["uri"]) for gone in event["evicts"]]
        print(table(("KEY", "FREES", "URI"), rows))
    return 0 if event["fits"] else 1


async def why(settings: Settings, arguments: argparse.Namespace) -> int:
    return await _one(settings, arguments, "why", {"model": arguments.model}, _explained)


def _explained(event: Event) -> int:
    print(event["answer"])
    for line in event["support"]:
        print(f"  {line}")
    return 0


async def pin(settings: Settings, arguments: argparse.Namespace) -> int:
    return await _one(settings, arguments, "pin", {"model": arguments.model}, _pinned)


async def unpin(settings: Settings, arguments: argparse.Namespace) -> int:
    return await _one(settings, arguments, "unpin", {"model": arguments.model}, _pinned)


def _pinned(event: Event) -> int:
    absent = "" if event["here"] else " (it is not here yet)"
    print(f"{event['event']}  {event['uri']}{absent}")
    return 0


async def evict(settings: Settings, arguments: argparse.Namespace) -> int:
    """Exit code 1 where one of them stays."""
    request = {"models": arguments.models, "dry_run": arguments.dry_run}
    events = await _events(settings, "evict", request)
    code = 0
    for event in events:
        if event["event"] == "error":
            code = max(code, exit_code(event))
            if arguments.output == "table":
                failed(event, arguments)
        elif arguments.output == "table":
            verb = "would go" if event["dry_run"] else "evicted"
            print(f"{verb}  {event['uri']}, frees {size(event['bytes'])}")
    if arguments.output == "json":
        print_json(events)
    return code


async def _one(
    settings: Settings,
    arguments: argparse.Namespace,
    verb: str,
    request: dict[str, Any],
    show: Callable[[Event], int],
) -> int:
    """A verb that answers with one event."""
    (event,) = await _events(settings, verb, request)
    if event["event"] == "error":
        return failed(event, arguments)
    if arguments.output == "json":
        print_json({name: value for name, value in event.items() if name != "event"})
        return 0 if event.get("fits", True) else 1
    return show(event)


async def _events(settings: Settings, verb: str, request: dict[str, Any]) -> list[Event]:
    async with changing(settings) as session, aclosing(session.curate(verb, request)) as events:
        return [event async for event in events]
