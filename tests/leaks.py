"""No secret of any test is ever seen where somebody could read it.

Every secret that a test makes holds the word `MARK`. Whatever commands print, agents log, put into
the files of their state, their metrics, their status, their Events and their Lease is held against
it, in every test: by `tests.machine` when a command or an agent ends, by the API server's fixture
when a session does, and by `LogScan` for all that is logged in the process of the tests.
"""

import logging
import os
from pathlib import Path

MARK = "sesame"
TOKEN = f"hf_{MARK}_of_the_machine"
"""The token that every machine of the tests has, and every hub of theirs knows."""

_SIGNED = "X-Amz-Signature="  # whoever has such a link has the file


def check(where: str, text: str) -> None:
    """Raises AssertionError, with what is around the secret."""
    for mark in (MARK, _SIGNED):
        at = text.lower().find(mark.lower())
        assert at < 0, f"a secret is shown in {where}: ...{text[max(0, at - 300) : at + 100]}..."


def check_files(directory: Path) -> None:
    """What an agent keeps beside the models: index, manifests, progress, pinned listings."""
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            check(str(path), path.read_bytes().decode(errors="replace"))


class LogScan(logging.Handler):
    """Notes every record of ours that shows a secret, with its traceback and the test."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[str] = []
        self._format = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            check(f"the log of {record.name}", self._format.format(record))
        except AssertionError as error:
            self.found.append(f"{os.environ.get('PYTEST_CURRENT_TEST', '')}: {error}")
