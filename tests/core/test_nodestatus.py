"""The status of a LocalModelNode, and the patch that makes it of another."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import AgentError, Reason
from agent.kube.nodestatus import (
    compose,
    disk_numbers,
    lost,
    merge_patch,
    no_more_downloaded,
    urgent,
    without,
)
from agent.model import Space, quantity
from agent.phases import Phase
from agent.status import KSERVE_STATUS
from tests.fakes.cluster import merged

DOWNLOADED = KSERVE_STATUS[Phase.READY]
PENDING = KSERVE_STATUS[Phase.PENDING]
NAMES = st.sampled_from(["a", "b", "c", "team/a"])
OBSTACLES = [None, *(AgentError(r, "why") for r in (Reason.OTHER_AGENT, Reason.DISK_MISSING))]


def body(phase: Phase, **fields: Any) -> dict[str, Any]:
    return {"modelStatus": KSERVE_STATUS[phase], "state": phase.value, "uri": "hf://a/b", **fields}


BODIES = st.dictionaries(
    NAMES,
    st.builds(
        lambda phase, reason: body(phase, **({"reason": reason} if reason else {})),
        st.sampled_from(list(Phase)),
        st.sampled_from([None, "Queued", *(reason.value for reason in Reason)]),
    ),
)


def composed(*names: str, now: float = 1e9, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "bodies": {},
        "obstacle": None,
        "disk": None,
        "hits": 0,
        "misses": 0,
        "version": "1",
        "before": {},
        **options,
    }
    bodies = given.pop("bodies")
    return compose(names, bodies, now=now, **given)


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    (found,) = [c for c in status["conditions"] if c["type"] == kind]
    return dict(found)


# -- compose ------------------------------------------------------------------------------------


@given(st.lists(NAMES, unique=True), BODIES, st.sampled_from(OBSTACLES))
def test_9_1_3_exactly_one_key_an_entry_and_downloaded_only_where_its_body_says_so(
    names: list[str], bodies: dict[str, Any], obstacle: AgentError | None
) -> None:
    status = composed(*names, bodies=bodies, obstacle=obstacle)
    assert list(status["modelStatus"]) == list(status["models"]) == names
    ready = {name for name, word in status["modelStatus"].items() if word == DOWNLOADED}
    said = {name for name in names if bodies.get(name, {}).get("modelStatus") == DOWNLOADED}
    assert ready == (set() if obstacle else said)
    assert status["summary"]["ready"] == f"{len(ready)}/{len(names)}"
    holds = obstacle is None and len(ready) == len(names)
    assert condition(status, "Ready")["status"] == str(holds)
    troubled = any(status["models"][name].get("reason") in set(Reason) for name in names)
    assert condition(status, "Degraded")["status"] == str(troubled or obstacle is not None)


def test_what_nobody_has_looked_at_is_pending() -> None:
    status = composed("a")
    assert status["modelStatus"] == {"a": PENDING}
    assert status["models"] == {"a": {"state": "Pending"}}


def test_an_obstacle_is_the_reason_everywhere() -> None:
    obstacle = AgentError(Reason.DISK_MISSING, "/models is away")
    status = composed("a", bodies={"a": body(Phase.READY)}, obstacle=obstacle)
    assert status["models"]["a"] == {
        "state": "Pending",
        "reason": "DiskMissing",
        "message": "/models is away",
    }
    for kind, holds in (("Ready", "False"), ("Degraded", "True")):
        found = condition(status, kind)
        assert (found["status"], found["reason"]) == (holds, "DiskMissing")


def test_a_model_has_what_people_read_and_nothing_else() -> None:
    known = body(Phase.READY, bytes=7, fingerprint="sha256:0", files=2, path="/models/x")
    assert composed("a", bodies={"a": known})["models"]["a"] == {
        "state": "Ready",
        "bytes": 7,
        "fingerprint": "sha256:0",
        "source": "hf://a/b",
    }


def test_one_models_texts_are_no_longer_than_people_read() -> None:
    long = body(Phase.FAILED, reason="Gated", message="m" * 5000) | {"uri": "hf://" + "x" * 60000}
    found = composed("a", bodies={"a": long})["models"]["a"]
    assert (len(found["message"]), len(found["source"])) == (1000, 1000)
    refused = composed("a", obstacle=AgentError(Reason.OTHER_AGENT, "o" * 5000))
    assert len(refused["models"]["a"]["message"]) == 1000


def test_degraded_names_the_first_three_and_counts_the_rest() -> None:
    failed = body(Phase.FAILED, reason="Gated", message="m" * 3000)
    found = condition(composed(*"abcde", bodies=dict.fromkeys("abcde", failed)), "Degraded")
    assert found["reason"] == "Gated"
    assert found["message"].startswith("a: mmm")
    assert len(found["message"]) <= 4000
    failed["message"] = "no"
    found = condition(composed(*"abcde", bodies=dict.fromkeys("abcde", failed)), "Degraded")
    assert found["message"] == "a: no; b: no; c: no; and 2 more"


def test_waiting_is_not_degraded() -> None:
    queued = body(Phase.PENDING, reason="Queued", message="waits")
    status = composed("a", bodies={"a": queued})
    assert condition(status, "Degraded")["status"] == "False"
    assert condition(status, "Ready")["reason"] == "ModelsNotReady"


def test_a_condition_keeps_its_time_until_it_turns() -> None:
    ready = {"a": body(Phase.READY)}
    first = composed("a", bodies=ready, now=1e9)
    since = condition(first, "Ready")["lastTransitionTime"]
    same = composed("a", "b", bodies=ready, now=2e9, before=first)  # turns Ready, not Degraded
    again = composed("a", bodies=ready, now=3e9, before=first)
    assert condition(again, "Ready")["lastTransitionTime"] == since
    assert condition(same, "Ready")["lastTransitionTime"] > since
    assert condition(same, "Degraded")["lastTransitionTime"] == since


def test_hits_in_percent_and_no_percent_of_nothing() -> None:
    assert composed()["summary"]["hitPercent"] == "-"
    assert composed(hits=2, misses=1)["summary"]["hitPercent"] == "66%"
    assert composed(hits=0, misses=5)["summary"]["hitPercent"] == "0%"


def test_a_disk_is_told_in_quantities() -> None:
    numbers = disk_numbers(Space(capacity=100 * 2**30, free=25 * 2**30), limit=95, reserved=0)
    assert composed(disk=numbers)["disk"] == {
        "capacity": "100Gi",
        "limit": "95",
        "used": "75Gi",
        "free": "25Gi",
        "reserved": "0",
    }
    assert "disk" not in composed()


# -- quantity -----------------------------------------------------------------------------------

UNITS = {"": 0, "Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5}


def value(text: str) -> float:
    number = text.rstrip("KMGTPi")
    return float(number) * 1024.0 ** UNITS[text[len(number) :]]


@given(st.integers(0, 2**60))
def test_a_quantity_is_short_and_right_to_a_twentieth(size: int) -> None:
    text = quantity(size)
    assert len(text) <= 6
    assert abs(value(text) - size) <= max(size / 20, 0)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (1, "1"),
        (10, "10"),
        (1023, "1023"),
        (1024, "1Ki"),
        (1536, "1.5Ki"),
        (2**29, "512Mi"),
        (100 * 2**30, "100Gi"),
        (int(1.4 * 2**40), "1.4Ti"),
        (2**60, "1024Pi"),
    ],
)
def test_quantities(size: int, text: str) -> None:
    assert quantity(size) == text


def test_larger_is_not_told_as_smaller() -> None:
    sizes = [n * 10**k for k in range(15) for n in (1, 2, 5)]
    assert all(value(quantity(a)) <= value(quantity(b)) for a, b in pairwise(sizes))


# -- merge_patch --------------------------------------------------------------------------------

_LEAF = st.sampled_from(["x", "y", 0, 1, True, [], ["x"], [{"type": "Ready"}]])
_TREE = st.recursive(
    _LEAF, lambda inner: st.dictionaries(st.sampled_from("abcd"), inner), max_leaves=12
)
_STATUS = st.dictionaries(st.sampled_from(["a", "b", "c", "d", "theirs"]), _TREE)


@given(_STATUS, _STATUS)
def test_a_patch_makes_ours_of_what_was_and_leaves_what_is_not(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    after.pop("theirs", None)
    result = merged(before, merge_patch(before, after))
    foreign = {name: old for name, old in before.items() if name not in after}
    assert result == {**foreign, **after}


@given(_STATUS)
def test_nothing_to_say_is_an_empty_patch(status: dict[str, Any]) -> None:
    assert merge_patch(status, status) == {}


def test_only_what_differs_is_sent_and_nulls_for_what_goes() -> None:
    before = {"models": {"a": {"state": "Ready", "reason": "x"}, "b": {}}, "theirs": 1}
    after = {"models": {"a": {"state": "Ready"}}}
    assert merge_patch(before, after) == {"models": {"a": {"reason": None}, "b": None}}


# -- what did not stick -------------------------------------------------------------------------


@given(_STATUS, _STATUS)
def test_what_stuck_is_not_lost(before: dict[str, Any], after: dict[str, Any]) -> None:
    patch = merge_patch(before, after)
    assert lost(patch, merged(before, patch)) == set()
    assert without(patch, set()) == patch


@given(_STATUS, _STATUS, st.sampled_from("abcd"))
def test_what_a_server_drops_is_lost_and_then_not_sent(
    before: dict[str, Any], after: dict[str, Any], dropped: str
) -> None:
    before.pop(dropped, None)
    patch = merge_patch(before, after)
    kept = {name: value for name, value in merged(before, patch).items() if name != dropped}
    found = lost(patch, kept)
    assert found == ({(dropped,)} if dropped in after else set())
    assert merge_patch(kept, merged(kept, without(patch, found))) == {}


def test_what_one_model_cannot_have_none_can() -> None:
    patch = {"models": {"a": {"state": "Ready", "revision": "1"}}, "summary": {"ready": "1/1"}}
    found = lost(patch, {"models": {"a": {"state": "Ready"}}})
    assert found == {("models", None, "revision"), ("summary",)}
    again = {"models": {"b": {"revision": "2", "state": "Failed"}, "c": {"revision": "3"}}}
    assert without(again, found) == {"models": {"b": {"state": "Failed"}}}
    assert without({"summary": {"ready": "2/2"}}, found) == {}


def test_what_was_downloaded_and_is_not_any_more() -> None:
    before = {"a": DOWNLOADED, "b": DOWNLOADED, "c": PENDING, "gone": DOWNLOADED}
    now = {"a": PENDING, "b": DOWNLOADED, "c": PENDING, "d": PENDING}
    assert no_more_downloaded(before, now) == {"a"}


# -- urgent -------------------------------------------------------------------------------------


CONDITION = {"type": "Ready", "status": "False", "reason": "ModelsNotReady", "message": "1 of 9"}


@pytest.mark.parametrize(
    ("patch", "told_at_once"),
    [
        ({}, False),
        ({"disk": {"free": "1Gi"}, "hits": 1, "misses": 2}, False),
        ({"summary": {"hitPercent": "1%"}}, False),
        ({"models": {"a": {"downloadedBytes": 7, "lastUsed": "now"}}}, False),
        ({"summary": {"ready": "1/1"}}, True),
        ({"modelStatus": {"a": DOWNLOADED}}, True),
        ({"conditions": [{**CONDITION, "message": "2 of 9"}]}, False),
        ({"conditions": [{**CONDITION, "reason": "Gated"}]}, True),
        ({"conditions": []}, True),
        ({"models": {"a": {"message": "7 of 9"}}}, False),
        ({"models": {"a": {"state": "Ready", "downloadedBytes": 7}}}, True),
        ({"models": {"a": {"downloadedBytes": 7}, "b": None}}, True),
        ({"agentVersion": "2"}, True),
    ],
)
def test_how_far_things_are_is_not_urgent(patch: dict[str, Any], told_at_once: bool) -> None:
    before = {"conditions": [CONDITION]}
    assert urgent(patch, before) is told_at_once


@pytest.mark.parametrize("phase", [Phase.PENDING, Phase.RESOLVING, Phase.FAILED])
@pytest.mark.parametrize("before", [DOWNLOADED, PENDING, "ModelDownloadError", None])
def test_what_kserves_agent_left_keeps_its_word_until_it_is_compared(
    phase: Phase, before: str | None
) -> None:
    said = {} if before is None else {"modelStatus": {"a": before}}
    bodies = {"a": body(phase, foreign="unknown")}
    status = composed("a", bodies=bodies, before=said)
    expected = DOWNLOADED if before == DOWNLOADED else PENDING
    assert status["modelStatus"] == {"a": expected}
    differs = {"a": body(phase, foreign="differs")}
    assert composed("a", bodies=differs, before=said)["modelStatus"]["a"] != DOWNLOADED
