"""Entry points: `localmodel`, `kubectl-localmodel` and `python -m agent`."""

import sys

from agent.cli import run
from agent.cli.kubectl import run_plugin


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def kubectl_main() -> None:
    sys.exit(run_plugin(sys.argv[1:]))


if __name__ == "__main__":
    main()
