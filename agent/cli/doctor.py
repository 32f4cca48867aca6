"""doctor: a line for each check, and an exit code."""

import argparse
import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from agent.cli.render import print_json
from agent.config import Settings

if TYPE_CHECKING:
    from agent.doctor import Check


async def doctor(settings: Settings, arguments: argparse.Namespace) -> int:
    """Exit code 1 where one check fails."""
    from agent.doctor import examine  # slow to import, and no other verb needs it

    checks = await examine(settings, os.environ, time.time())
    if arguments.output == "json":
        print_json([asdict(check) for check in checks])
    else:
        print(_lines(checks))
    return int(any(check.level == "fail" for check in checks))


def _lines(checks: "list[Check]") -> str:
    width = max(len(check.name) for check in checks)
    return "\n".join(
        f"{check.level:<4}  {check.name:<{width}}  {check.seen}"
        + (f"; {check.advice}" if check.advice else "")
        for check in checks
    )
