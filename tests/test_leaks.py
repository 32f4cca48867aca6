"""The scan for secrets finds them: it is used by all tests, and would not be missed."""

import logging
import sys
from pathlib import Path

import pytest

from tests import leaks
from tests.conftest import URI
from tests.fakes.hub import Hub
from tests.machine import Machine


@pytest.mark.parametrize(
    "text", [f"Bearer {leaks.TOKEN}", "https://store/x?x-amz-signature=0a", leaks.MARK.upper()]
)
def test_a_secret_is_found(text: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a secret is shown in here"):
        leaks.check("here", f"before {text} behind")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "index").write_bytes(b"\xff\0" + text.encode())
    with pytest.raises(AssertionError, match="deep/index"):
        leaks.check_files(tmp_path)


def test_a_secret_in_a_traceback_that_is_logged_is_found() -> None:
    scan = leaks.LogScan()
    try:
        raise ValueError(leaks.TOKEN)
    except ValueError:
        logged = logging.LogRecord("agent.x", logging.DEBUG, "", 0, "failed", (), None)
        logged.exc_info = sys.exc_info()
    scan.emit(logged)
    assert len(scan.found) == 1
    assert "agent.x" in scan.found[0]


def test_the_machines_token_really_goes_to_the_hub(localmodel: Machine, hub: Hub) -> None:
    """Else the scans of all other tests would look for what was never there."""
    localmodel.inline("pull", URI).ok()
    assert f"Bearer {leaks.TOKEN}" in {request.authorization for request in hub.requests}
