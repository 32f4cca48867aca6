"""What a pod that waits is told: of all that there is to say of its models, what is worst."""

from dataclasses import replace
from math import inf

import pytest

from agent.errors import Reason
from agent.model import (
    Attempt,
    Block,
    Blocked,
    CacheKey,
    Entry,
    Foreign,
    Ingest,
    Job,
    ModelRef,
    Stage,
    cache_key,
)
from agent.phases import Phase
from agent.status import Facts
from agent.wishes import Desired, SpecError
from agent.words import SAYS, Said, Word, of_bypass, of_waiting

URI, OTHER = "hf://acme/tiny", "hf://acme/other"
KEY, OTHER_KEY = cache_key(URI), cache_key(OTHER)
GIB = 2**30
DESIRED = Desired(wants={}, names={})


def facts(uri: str = URI, **known: object) -> Facts:
    made = Facts(key=cache_key(uri), ref=ModelRef(uri=uri), wanted=True)
    return replace(made, **known)  # type: ignore[arg-type]  # by name


def entry(uri: str = URI) -> Entry:
    return Entry(
        ref=ModelRef(uri=uri),
        revision="r",
        fingerprint="sha256:00",
        bytes=GIB,
        files=1,
        sealed_at=0.0,
        last_used=0.0,
    )


def job(stage: Stage, uri: str = URI) -> Job:
    total = None if stage is Stage.RESOLVING else 10 * GIB
    return Job(key=cache_key(uri), stage=stage, total=total, done=3 * GIB)


def failed(reason: Reason, message: str = "no") -> Attempt:
    return Attempt(key=KEY, count=1, reason=reason, message=message, retry_at=inf)


def block(why: Blocked, message: str = "the numbers") -> Block:
    return Block(why=why, message=message)


def told(*found: Facts, desired: Desired = DESIRED, keys: set[CacheKey] | None = None) -> Word:
    known = {fact.key: fact for fact in found}
    word = of_waiting(keys or set(known), known, desired)
    assert word is not None
    return word


WAITING = {
    "about to be listed": (facts(), "pending"),
    "its cache says its size": (facts(floor=GIB), "0 of 1Gi, pending"),
    "listed": (facts(job=job(Stage.RESOLVING)), "resolving"),
    "on its way": (facts(job=job(Stage.FETCHING)), "3Gi of 10Gi, fetching"),
    "hashed again": (facts(job=job(Stage.VERIFYING)), "3Gi of 10Gi, verifying"),
    "queued": (
        facts(
            ingest=Ingest(ref=ModelRef(uri=URI), revision="r", total=GIB, done=0),
            block=block(Blocked.QUEUED, "waits for one of 2 slots"),
        ),
        "0 of 1Gi, waits for one of 2 slots",
    ),
    "damaged": (facts(entry=entry(), damaged=True), "it was found damaged and is off offer"),
}


@pytest.mark.parametrize("case", WAITING)
def test_a_pod_is_told_how_far_its_model_is(case: str) -> None:
    fact, says = WAITING[case]
    word = told(fact)
    assert (word.kind, word.reason) == ("Normal", "WaitsForModel")
    assert word.message == f"waits for {URI}: {says}; it starts once that is complete"


TROUBLE = {
    "the source has none": (
        facts(attempt=failed(Reason.REPOSITORY_NOT_FOUND, "404 of it")),
        Reason.REPOSITORY_NOT_FOUND,
        "404 of it",
    ),
    "tried again soon": (
        facts(attempt=failed(Reason.NETWORK, "no route")),
        Reason.NETWORK,
        "no route",
    ),
    "no room": (
        facts(block=block(Blocked.INSUFFICIENT_CAPACITY)),
        Reason.INSUFFICIENT_CAPACITY,
        "the numbers",
    ),
    "too large": (facts(block=block(Blocked.LARGER_THAN_VOLUME)), "LargerThanVolume", "numbers"),
    "in the way": (
        facts(block=block(Blocked.FOREIGN_DIRECTORY)),
        Reason.FOREIGN_DIRECTORY,
        "the numbers",
    ),
    "failed while something else is tried": (
        facts(attempt=failed(Reason.GATED), block=block(Blocked.BACKING_OFF)),
        Reason.GATED,
        "no",
    ),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_a_pod_is_told_why_its_model_does_not_come(case: str) -> None:
    fact, reason, says = TROUBLE[case]
    word = told(fact)
    assert (word.kind, word.reason) == ("Warning", reason)
    assert word.message.startswith(f"{URI}: ")
    assert says in word.message


def test_what_is_here_is_ready_also_while_it_is_adopted() -> None:
    adopting = facts(OTHER, foreign=Foreign(lacking=frozenset()))
    assert adopting.phase is Phase.ADOPTING
    word = told(facts(entry=entry()), adopting)
    assert (word.kind, word.reason) == ("Normal", "ModelReady")
    assert URI in word.message
    assert OTHER in word.message
    # That nothing in the desired state asks for it is no matter then.
    assert told(facts(entry=entry(), wanted=False)).reason == Said.READY


def test_of_several_models_the_worst_is_said() -> None:
    here, coming = facts(entry=entry()), facts(OTHER, job=job(Stage.FETCHING, OTHER))
    word = told(here, coming)
    assert word.message.startswith(f"waits for {OTHER}: 3Gi of 10Gi")
    assert URI not in word.message, "that one is here"
    wrong = facts("hf://acme/wrong", attempt=failed(Reason.GATED))
    assert told(here, coming, wrong).reason == Reason.GATED
    many = [facts(f"hf://acme/{number}") for number in range(9)]
    message = told(*many).message
    assert message.count("hf://") == 3
    assert "; and 6 more" in message


def test_a_model_that_nobody_asks_for_is_said_with_where_to_look() -> None:
    word = told(keys={KEY})
    assert (word.kind, word.reason) == ("Warning", "NotAskedFor")
    assert KEY in word.message
    assert "LocalModelCache" in word.message
    begun = facts(wanted=False, ingest=Ingest(ref=ModelRef(uri=URI), revision="", total=2, done=1))
    assert told(begun).reason == Said.NOT_ASKED_FOR
    assert f"{URI} ({KEY})" in told(begun).message


def test_an_entry_that_is_refused_says_why_and_one_that_is_unclear_nothing() -> None:
    error = SpecError(name="tiny", message="at another path", reason=Reason.PATH_MISMATCH)
    refused = replace(DESIRED, spoken_for=frozenset({KEY}), refused={KEY: error})
    word = told(desired=refused, keys={KEY})
    assert (word.kind, word.reason) == ("Warning", "PathMismatch")
    assert word.message == "tiny: at another path"
    unclear = replace(DESIRED, spoken_for=frozenset({KEY}))
    assert of_waiting({KEY}, {}, unclear) is None
    # What is known of its other model is no reason to say that all is here.
    here = {OTHER_KEY: facts(OTHER, entry=entry(OTHER))}
    assert of_waiting({KEY, OTHER_KEY}, here, unclear) is None


def test_who_goes_past_the_cache_is_told_what_to_look_at_in_a_few_words() -> None:
    says = {
        "has it": facts(entry=entry()),
        "is bringing it": facts(job=job(Stage.FETCHING)),
        "caches it": None,
    }
    for here, fact in says.items():
        for uri in (URI, f"s3://{'bucket/' * 200}"):
            word = of_bypass(uri, fact, namespace="localmodel-system")
            assert (word.kind, word.reason) == ("Warning", "CacheBypassed")
            assert f"this node {here}" in word.message
            assert uri[:60] in word.message
            assert "-n localmodel-system get deploy localmodel-controller" in word.message
            assert "localmodel_hook_pods_total" in word.message
            assert len(word.message) <= 300
    assert "caches it" in of_bypass(URI, facts(), namespace="n").message


def test_every_reason_is_explained_and_is_a_reason_to_kubernetes() -> None:
    assert set(SAYS) == set(Said)
    assert not {said.value for said in Said} & {reason.value for reason in Reason}
    assert all(said.value.isalnum() and said.value[0].isupper() for said in Said)
