"""`localmodel controller` that waits no minute between its looks: `hurried SECONDS FLAGS...`."""

import sys
from functools import partial
from unittest.mock import patch

from agent.cli import run
from agent.controller import run_controller


def main(seconds: str, *flags: str) -> int:
    hurried = partial(run_controller, look_seconds=float(seconds))
    with patch("agent.controller.run_controller", hurried):
        return run(["controller", *flags])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
