"""Each fault of a hub again, from an object store and from a web server: none is published."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.errors import AgentError, Reason
from agent.model import Listing, ModelRef
from agent.sources.base import Source
from agent.sources.http import Web
from agent.sources.s3 import S3
from agent.transfer import Engine, FileJob
from tests.fakes.faults import (
    Corrupt,
    Dribble,
    Fault,
    IgnoreRange,
    Long,
    PartialAs200,
    Reset,
    Short,
    Stall,
    Status,
    Truncate,
)
from tests.fakes.origin import Origin, files, in_front_of
from tests.fakes.s3 import Store

DATA = random.Random(4).randbytes(300_000)
NAME = "model.safetensors"
WEIGHTS = f"*/{NAME}"


@dataclass
class World:
    """One source of one file, behind an origin that may misbehave."""

    origin: Origin
    source: Source
    ref: ModelRef
    promised: bool

    async def listing(self) -> Listing:
        return await self.source.list(self.ref)

    async def bring(self, listing: Listing, path: Path, retries: list[Reason]) -> bytes:
        (file,) = listing.files
        engine = Engine(stall_seconds=1.0, dice=lambda: 0.0)
        try:
            await engine.fetch(
                FileJob(
                    path=path,
                    size=file.size,
                    promised=file.digest,
                    locate=lambda: self.source.locate(listing, file),
                    on_bytes=lambda done, received: None,
                    on_retry=lambda error: retries.append(error.reason),
                )
            )
        finally:
            engine.close()
        return path.read_bytes()


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with Store() as store:
        store.put("models", {f"tiny/{NAME}": DATA})
        yield store


@pytest.fixture(params=["s3", "https"])
def world(request: pytest.FixtureRequest, store: Store) -> Iterator[World]:
    if request.param == "s3":
        with Origin(in_front_of(store.endpoint)) as origin:
            source = S3({**store.environment, "AWS_ENDPOINT_URL": origin.endpoint})
            yield World(origin, source, ModelRef(uri="s3://models/tiny"), promised=True)
        return
    with Origin(files({f"/x/{NAME}": DATA})) as origin:
        ref = ModelRef(uri=f"{origin.endpoint}/x/{NAME}")
        yield World(origin, Web(), ref, promised=False)


@pytest.mark.parametrize(
    "fault",
    [
        Truncate(after=100_000),
        Reset(after=100_000),
        Stall(after=100_000),
        Dribble(bytes_per_second=50),
        Short(by=1),
        Long(by=1),
        Status(500),
        Status(503, headers={"Retry-After": "1"}),
        Status(429, headers={"Retry-After": "1"}),
    ],
    ids=lambda fault: type(fault).__name__ + str(getattr(fault, "code", "")),
)
async def test_a_fault_that_passes_costs_a_retry_and_no_more(
    world: World, tmp_path: Path, fault: Fault
) -> None:
    listing, retries = await world.listing(), list[Reason]()
    world.origin.fault(WEIGHTS, fault, times=1)
    assert await world.bring(listing, tmp_path / "x", retries) == DATA
    assert len(retries) == 1


async def test_a_wrong_byte_is_seen_where_anything_was_promised(
    world: World, tmp_path: Path
) -> None:
    """A web server that promises no digest can send anything: docs/sources.md says so."""
    listing, retries = await world.listing(), list[Reason]()
    world.origin.fault(WEIGHTS, Corrupt(offset=123_456), times=1)
    brought = await world.bring(listing, tmp_path / "x", retries)
    assert (brought == DATA) is world.promised
    assert retries == ([Reason.DIGEST_MISMATCH] if world.promised else [])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Short(by=1), Reason.SIZE_MISMATCH),
        (Long(by=1), Reason.SIZE_MISMATCH),
        (Status(404), Reason.FILE_NOT_FOUND),
        (Status(403), Reason.UNAUTHORIZED),
        (Status(412), Reason.SOURCE_CHANGED),
        (Status(429, headers={"Retry-After": "3600"}), Reason.RATE_LIMITED),
    ],
    ids=lambda value: type(value).__name__ + str(getattr(value, "code", "")),
)
async def test_a_fault_that_stays_has_its_reason(
    world: World, tmp_path: Path, fault: Fault, reason: Reason
) -> None:
    listing = await world.listing()
    world.origin.fault(WEIGHTS, fault)
    with pytest.raises(AgentError) as caught:
        await world.bring(listing, tmp_path / "x", [])
    assert caught.value.reason is reason


@pytest.mark.parametrize("fault", [IgnoreRange(), PartialAs200()], ids=["whole", "part"])
async def test_a_range_that_is_answered_with_200(
    world: World, tmp_path: Path, fault: Fault
) -> None:
    """The whole file restarts it; a part that calls itself the whole is refused."""
    listing = await world.listing()
    world.origin.fault(WEIGHTS, Truncate(after=100_000), times=1)
    world.origin.fault(WEIGHTS, fault, times=1)
    if isinstance(fault, IgnoreRange):
        assert await world.bring(listing, tmp_path / "x", []) == DATA
        return
    with pytest.raises(AgentError) as caught:
        await world.bring(listing, tmp_path / "x", [])
    assert caught.value.reason is Reason.BAD_RESPONSE
