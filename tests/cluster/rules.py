"""What roles grant and what the API server logged, in the same words: group, resource, verb."""

from collections.abc import Iterable, Mapping
from typing import Any

Call = tuple[str, str, str]
"""Group, resource with its subresource, verb."""


def granted(rules: Iterable[Mapping[str, Any]]) -> set[Call]:
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def calls(events: Iterable[Mapping[str, Any]]) -> set[Call]:
    """Of lines of the audit log."""
    return {
        (
            event["objectRef"].get("apiGroup", ""),
            "/".join(
                event["objectRef"][name]
                for name in ("resource", "subresource")
                if name in event["objectRef"]
            ),
            event["verb"],
        )
        for event in events
    }


def refused(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """What was asked for and may not be."""
    return [
        f"{event['verb']} {event['requestURI']}"
        for event in events
        if event.get("responseStatus", {}).get("code") in (401, 403)
    ]
