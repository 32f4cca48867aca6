"""The index: what it keeps, that it heals, and that nobody ever fails because of it."""

import asyncio
import logging
import random
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from agent.errors import AgentError, Reason
from agent.index import Index
from agent.model import Asked, Attempt, CacheKey, Entry, ModelRef, Past
from agent.schema import migrations
from tests.edges.volume import UNSHARE, fill, in_child, mounted, needs_mounts

A, B, C = (
    Entry(
        ref=ModelRef(uri=f"hf://org/{name}"),
        revision="r1",
        fingerprint="sha256:00",
        bytes=1 << 40,
        files=1,
        sealed_at=100.0,
        last_used=used,
    )
    for name, used in (("a", 110.0), ("b", 120.0), ("c", 130.0))
)
FAILED = Attempt(
    key=A.key, count=3, reason=Reason.RATE_LIMITED, message='a "quoted" text', retry_at=170.5
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite3"


@asynccontextmanager
async def opened(path: Path, *entries: Entry) -> AsyncIterator[Index]:
    """An index beside manifests that speak of these models."""
    index = Index(path, lambda: entries)
    await index.open()
    try:
        yield index
    finally:
        await index.close()


def rows(
    path: Path, sql: str = "select key, uses, last_used from models order by key"
) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


def damaged(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.damaged"))


# -- what it keeps ------------------------------------------------------------------------------


async def test_everything_survives_a_restart(path: Path) -> None:
    async with opened(path, A, B) as index:
        await index.record_use(A.key, 500.0)
        await index.record_use(A.key, 400.0)
        await index.record_seal(C)
        await index.record_attempt(FAILED)
    async with opened(path, A, B, C) as index:
        assert await index.last_uses() == {A.key: 500.0, B.key: 120.0, C.key: 130.0}
        assert await index.attempts() == {A.key: FAILED}
    assert dict((key, uses) for key, uses, _ in rows(path)) == {A.key: 2, B.key: 0, C.key: 0}


async def test_what_was_asked_for_and_left_survives_a_restart(path: Path) -> None:
    stays = Asked(owner="uid-1", retain_seconds=60.0)
    left = Asked(owner="", left_at=500.5)
    async with opened(path, A) as index:
        await index.record_asked(A.key, stays)
        await index.record_asked(B.key, stays)
        await index.record_asked(B.key, left)
        await index.record_asked(C.key, left)
        await index.forget_asked(C.key)
        await index.record_proven(A.key, 700.0)
        await index.record_refreshed(A.key, "1")
        await index.record_refreshed(A.key, "2")
    async with opened(path, A) as index:
        assert await index.asked() == {A.key: stays, B.key: left}
        assert await index.proven() == {A.key: 700.0}
        assert await index.refreshed() == {A.key: "2"}


async def test_history_is_told_in_order_by_model_and_from_a_time_on(path: Path) -> None:
    sealed = Past(at=100.0, key=A.key, uri=A.ref.uri, what="Sealed", bytes=1 << 40)
    gone = Past(
        at=200.0,
        key=A.key,
        uri=A.ref.uri,
        what="Evicted",
        why="Space",
        bytes=5,
        age_seconds=100.0,
        idle_seconds=7.5,
    )
    other = Past(at=150.0, key=B.key, uri=B.ref.uri, what="Sealed")
    async with opened(path) as index:
        for past in (sealed, other, gone):
            await index.record_past(past)
    async with opened(path) as index:
        assert await index.past() == [sealed, other, gone]
        assert await index.past(A.key) == [sealed, gone]
        assert await index.past(since=150.0) == [other, gone]
        assert await index.past(C.key) == []


async def test_history_has_an_end(path: Path) -> None:
    async with opened(path) as index:
        await index.record_past(Past(at=1.0, key=A.key, uri=A.ref.uri, what="Sealed"))
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("update history set id = id + 10000")
        await index.record_past(Past(at=2.0, key=A.key, uri=A.ref.uri, what="Damaged"))
        assert [past.what for past in await index.past()] == ["Sealed", "Damaged"]
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("update history set id = id + 10000 where what = 'Damaged'")
        await index.record_past(Past(at=3.0, key=A.key, uri=A.ref.uri, what="Sealed"))
        assert [past.at for past in await index.past()] == [2.0, 3.0]


async def test_the_last_use_never_runs_backwards(path: Path) -> None:
    """Neither by a clock that was set back, nor by a manifest that was not touched in a while."""
    async with opened(path, A) as index:
        await index.record_use(A.key, 900.0)
        await index.record_use(A.key, 300.0)
        await index.record_seal(A)
        assert await index.last_uses() == {A.key: 900.0}
    async with opened(path, A) as index:
        assert await index.last_uses() == {A.key: 900.0}


async def test_a_use_of_what_is_not_here_is_none(path: Path) -> None:
    async with opened(path) as index:
        await index.record_use(A.key, 1.0)
        await index.record_gone(A.key)
        assert await index.last_uses() == {}


async def test_adopting_drops_what_is_gone_and_keeps_the_uses(path: Path) -> None:
    async with opened(path, A, B) as index:
        await index.record_use(A.key, 500.0)
        await index.adopt([A, C])
        assert set(await index.last_uses()) == {A.key, C.key}
    assert rows(path) == sorted([(A.key, 1, 500.0), (C.key, 0, 130.0)])


async def test_what_the_manifests_say_counts_at_every_start(path: Path) -> None:
    async with opened(path, A):
        pass
    async with opened(path, B) as index:
        assert await index.last_uses() == {B.key: 120.0}


async def test_a_seal_ends_the_failures_in_a_row(path: Path) -> None:
    async with opened(path) as index:
        await index.record_attempt(FAILED)
        await index.record_seal(A)
        assert await index.attempts() == {}
        await index.record_attempt(FAILED)
        await index.forgive(A.key)
        assert await index.attempts() == {}


async def test_only_the_last_attempt_of_a_key_is_kept(path: Path) -> None:
    async with opened(path) as index:
        await index.record_attempt(FAILED)
        again = Attempt(key=A.key, count=1, reason=Reason.GATED, message="", retry_at=float("inf"))
        await index.record_attempt(again)
        assert await index.attempts() == {A.key: again}


async def test_every_reason_makes_the_round_trip(path: Path) -> None:
    attempts = {
        CacheKey(f"{number:016x}"): Attempt(
            key=CacheKey(f"{number:016x}"), count=1, reason=reason, message="", retry_at=1.0
        )
        for number, reason in enumerate(Reason)
    }
    async with opened(path) as index:
        for attempt in attempts.values():
            await index.record_attempt(attempt)
        assert await index.attempts() == attempts


async def test_proofs_of_credentials_survive_and_the_oldest_of_very_many_go(path: Path) -> None:
    async with opened(path) as index:
        await index.record_access_proof("team-a/x", "one", 1.0)
        await index.record_access_proof("team-a/x", "two", 2.0)
        await index.record_access_proof("team-b/y", "one", 1.0)
    with closing(sqlite3.connect(path)) as db, db:
        many = [(f"n/{number}", "c", 3.0) for number in range(9_998)]
        db.executemany("insert into access_proofs values (?, ?, ?)", many)
    async with opened(path) as index:
        proofs = await index.access_proofs()
        assert (proofs["team-a/x"], proofs["team-b/y"]) == ("two", "one")
        await index.record_access_proof("team-c/z", "one", 4.0)
        proofs = await index.access_proofs()
        assert len(proofs) == 10_000
        assert "team-b/y" not in proofs
        assert proofs["team-a/x"] == "two"


async def test_a_word_of_a_newer_version_is_skipped(path: Path) -> None:
    async with opened(path) as index:
        await index.record_attempt(FAILED)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("insert into attempts values ('x', 1, 'NotInventedYet', '', 0)")
    async with opened(path) as index:
        assert await index.attempts() == {A.key: FAILED}


async def test_migrations_are_applied_once(path: Path) -> None:
    for _ in range(3):
        async with opened(path, A):
            pass
    names = rows(path, "select name from _sqlite_migrations order by name")
    assert [name for (name,) in names] == [
        "access_proofs",
        "asked_and_pods",
        "bypasses",
        "history_and_leaving",
        "models_and_attempts",
        "proofs",
        "refreshes",
    ]
    assert migrations.name == "localmodel-index"


async def test_hundreds_of_calls_at_once(path: Path) -> None:
    """One thread, so there is nothing to lock; one transaction each, so nothing is lost."""
    async with opened(path, A, B) as index:
        calls = [index.record_use((A, B)[n % 2].key, 1000.0 + n) for n in range(400)]
        calls += [index.record_attempt(FAILED) for _ in range(50)]
        random.Random(1).shuffle(calls)
        looks = [index.last_uses() for _ in range(50)]
        await asyncio.gather(*calls, *looks)
        assert await index.last_uses() == {A.key: 1398.0, B.key: 1399.0}
    assert [uses for _, uses, _ in rows(path)] == [200, 200]


async def test_a_cancelled_caller_harms_nobody(path: Path) -> None:
    async with opened(path, A) as index:
        task = asyncio.create_task(index.record_use(A.key, 500.0))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert await index.last_uses() in ({A.key: 500.0}, {A.key: 110.0})


# -- it heals -----------------------------------------------------------------------------------


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def deleted(path: Path) -> None:
    path.unlink()


def another_schema(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("create table models (another text)")


def broken_inside(path: Path) -> None:
    """The header is fine; a page of a table is not."""
    data = bytearray(path.read_bytes())
    data[4096:] = random.Random(2).randbytes(len(data) - 4096)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil", [garbage, truncated, emptied, deleted, another_schema, broken_inside]
)
async def test_what_is_found_spoiled_is_rebuilt(
    path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(path, A, B) as index:
        await index.record_use(A.key, 500.0)
    spoil(path)
    before = path.read_bytes() if path.exists() else b""
    async with opened(path, A, B) as index:
        assert await index.last_uses() == {A.key: 110.0, B.key: 120.0}
        await index.record_use(A.key, 600.0)
    async with opened(path, A, B) as index:
        assert await index.last_uses() == {A.key: 600.0, B.key: 120.0}
    if spoil not in (emptied, deleted):
        (aside,) = damaged(path)
        # A sound file of somebody else's gets SQLite's mark of a write-ahead log before we know.
        assert spoil is another_schema or aside.read_bytes() == before
        assert "rebuilt from the manifests" in caplog.text


async def test_a_spoiled_log_of_writes_costs_the_last_of_them(path: Path) -> None:
    """An agent that was killed leaves one; what is in it may be anything."""
    async with opened(path, A) as index:
        await index.record_use(A.key, 500.0)
        left = {part: Path(f"{path}{part}").read_bytes() for part in ("", "-wal")}
    for part, data in left.items():
        Path(f"{path}{part}").write_bytes(data if not part else data[:60] + b"garbage" * 300)
    async with opened(path, A, B) as index:
        assert set(await index.last_uses()) == {A.key, B.key}
        await index.record_use(A.key, 600.0)
        assert (await index.last_uses())[A.key] == 600.0


async def test_what_is_spoiled_under_way_heals(path: Path) -> None:
    """At the next statement that reads it, or at the next start: no caller notices."""
    async with opened(path, A, B) as index:
        await index.record_use(A.key, 500.0)
        for part in (path, Path(f"{path}-wal")):
            garbage(part)
        for number in range(50):
            await index.record_use(A.key, 600.0 + number)
            await index.record_attempt(FAILED)
        assert set(await index.last_uses()) == {A.key, B.key}
        assert await index.attempts() == {A.key: FAILED}
    async with opened(path, A, B) as index:
        assert set(await index.last_uses()) == {A.key, B.key}


async def test_damage_that_a_statement_meets_is_mended_within_it(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(path, A, B) as index:
        await index.record_use(A.key, 500.0)
    async with opened(path, A, B) as index:
        # Through another connection, so that ours has to read the pages again.
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("pragma writable_schema = on")
            other.execute("update sqlite_master set rootpage = 9999 where name = 'models'")
            other.execute("pragma schema_version = 99")
        await index.record_use(A.key, 700.0)
        assert await index.last_uses() == {A.key: 700.0, B.key: 120.0}
    assert "rebuilt from the manifests" in caplog.text
    assert len(damaged(path)) == 1


async def test_the_damaged_do_not_pile_up(path: Path) -> None:
    for _ in range(3):
        async with opened(path, A):
            pass
        garbage(path)
    async with opened(path, A):
        pass
    assert len(damaged(path)) == 1


async def test_a_rebuild_that_fails_says_why(path: Path) -> None:
    def rebuild() -> list[Entry]:
        raise AgentError(Reason.DISK_ERROR, "the manifests cannot be read")

    index = Index(path, rebuild)
    with pytest.raises(AgentError, match="the manifests cannot be read"):
        await index.open()
    await index.close()


# -- nobody fails because of it -----------------------------------------------------------------


async def test_without_a_directory_it_lives_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path / "missing" / "index.sqlite3", A) as index:
        await index.record_use(A.key, 500.0)
        await index.record_attempt(FAILED)
        assert await index.last_uses() == {A.key: 500.0}
        assert await index.attempts() == {A.key: FAILED}
    assert "it is kept in memory" in caplog.text


async def test_damage_that_cannot_be_moved_aside_is_left(path: Path) -> None:
    async with opened(path, A):
        pass
    garbage(path)
    before = path.read_bytes()
    Path(f"{path}.damaged").mkdir()  # in the way, as a read-only directory would be
    async with opened(path, A) as index:
        assert await index.last_uses() == {A.key: 110.0}
    assert path.read_bytes() == before


async def test_a_write_that_fails_is_a_line_in_the_log(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(path, A) as index:
        # Another process holds the lock for longer than SQLite waits for it.
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            await index._run(lambda db: db.execute("pragma busy_timeout = 10"))
            other.execute("begin immediate")
            await index.record_use(A.key, 500.0)
            other.execute("rollback")
        (line,) = (record for record in caplog.records if record.name == "agent.index")
        assert line.levelno == logging.WARNING
        assert "database is locked" in line.getMessage()
        await index.record_use(A.key, 600.0)
        assert await index.last_uses() == {A.key: 600.0}
    assert damaged(path) == []


# In a mount namespace of their own.


def a_full_disk() -> None:
    async def run(root: Path) -> None:
        path = root / "index.sqlite3"
        async with opened(path, A, B) as index:
            await index.record_use(A.key, 500.0)
            filler = fill(root)
            for number in range(300):  # beyond what the log of writes has room for
                await index.record_use(A.key, 600.0 + number)
                await index.record_attempt(FAILED)
            assert set(await index.last_uses()) == {A.key, B.key}
            filler.unlink()
            await index.record_use(A.key, 2000.0)
            assert (await index.last_uses())[A.key] == 2000.0
        assert damaged(path) == []
        for part in root.glob("index*"):
            part.unlink()
        filler = fill(root)
        async with opened(path, A, B) as index:
            await index.record_use(A.key, 3000.0)
            assert (await index.last_uses())[A.key] == 3000.0
        filler.unlink()
        async with opened(path, A, B) as index:
            await index.record_use(A.key, 4000.0)
        assert rows(path, "select max(last_used) from models") == [(4000.0,)]

    with mounted("size=1m") as root:
        asyncio.run(run(root))


def a_read_only_disk() -> None:
    async def run(root: Path) -> None:
        path = root / "index.sqlite3"
        async with opened(path, A):
            pass
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        async with opened(path, A, B) as index:
            await index.record_use(A.key, 500.0)
            assert await index.last_uses() == {A.key: 500.0, B.key: 120.0}
        subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
        garbage(path)
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        async with opened(path, A) as index:
            await index.record_use(A.key, 500.0)
            assert await index.last_uses() == {A.key: 500.0}

    with mounted("size=1m") as root:
        asyncio.run(run(root))


@needs_mounts
@pytest.mark.parametrize("child", [a_full_disk, a_read_only_disk], ids=lambda child: child.__name__)
def test_on_a_file_system_of_its_own(child: Callable[[], None]) -> None:
    in_child(child, wrap=UNSHARE)
