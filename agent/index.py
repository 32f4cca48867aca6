"""What files cannot hold: last use, uses and the failures in a row. SQLite, through sqlite-utils.

An index, never the truth (design D1): it is checked at start, moved aside when damaged, and filled
again from the manifests. All statements run on one thread that owns the only connection, so there
are no locks, and the event loop never waits for a disk.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from sqlite_utils import Database

from agent.errors import AgentError, Reason
from agent.model import Asked, Attempt, CacheKey, Entry, Past
from agent.schema import migrations

_T = TypeVar("_T")
_MEMORY = Path(":memory:")
_log = logging.getLogger(__name__)


class Index:
    """The index of one volume. Every coroutine is one transaction.

    `rebuild` gives the entries that the manifests speak of; it is asked, on the index's own
    thread, whenever the file is opened or had to be thrown away. Where no file can be had (a full
    or read-only disk) the index is kept in memory, until the next start.
    """

    def __init__(self, path: Path, rebuild: Callable[[], Iterable[Entry]]) -> None:
        self._path = path
        self._rebuild = rebuild
        self._db: Database | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="index")

    async def open(self) -> None:
        """Open, check, migrate; begin anew when the file is damaged."""
        await self._call(self._ready)

    async def close(self) -> None:
        await self._call(self._close)
        self._thread.shutdown(wait=False)

    async def adopt(self, entries: Iterable[Entry]) -> None:
        """Make the rows those of the sealed models, keeping what is known of their use."""
        await self._run(partial(_adopt, list(entries)))

    async def record_seal(self, entry: Entry) -> None:
        def statement(db: Database) -> None:
            _upsert(db, entry)
            _forgive(db, entry.key)

        await self._note(statement)

    async def record_use(self, key: CacheKey, when: float, *, uses: int = 1) -> None:
        """`when` is Unix seconds; time does not run backwards for an entry."""
        await self._note(
            lambda db: db.execute(
                "update models set uses = uses + ?, last_used = max(last_used, ?) where key = ?",
                [uses, when, key],
            )
        )

    async def record_proven(self, key: CacheKey, when: float) -> None:
        """Every byte was hashed again, and was as sealed or was reported."""
        await self._note(
            lambda db: db.execute("update models set proven_at = ? where key = ?", [when, key])
        )

    async def proven(self) -> dict[CacheKey, float]:
        """Unix seconds of the last such proof after the seal; 0 for none."""
        return await self._run(
            lambda db: {
                CacheKey(key): at
                for key, at in db.execute("select key, proven_at from models").fetchall()
            }
        )

    async def record_refreshed(self, key: CacheKey, token: str) -> None:
        """The source was asked again because of this value of the annotation."""
        row = [key, token]
        await self._note(
            lambda db: db.execute("insert or replace into refreshed values (?, ?)", row)
        )

    async def refreshed(self) -> dict[CacheKey, str]:
        return await self._run(
            lambda db: {
                CacheKey(key): token
                for key, token in db.execute("select key, token from refreshed").fetchall()
            }
        )

    async def record_access_proof(self, name: str, credentials: str, when: float) -> None:
        """The credentials that a cache names, by their digest, have led to its model once. Of many
        caches that came and went, the newest ten thousand are kept."""

        def statement(db: Database) -> None:
            row = [name, credentials, when]
            db.execute("insert or replace into access_proofs values (?, ?, ?)", row)
            db.execute(
                "delete from access_proofs where name in"
                " (select name from access_proofs order by at desc limit -1 offset 10000)"
            )

        await self._note(statement)

    async def access_proofs(self) -> dict[str, str]:
        """By the name of a cache, the digest of the credentials that were proven last."""
        return await self._run(
            lambda db: dict(db.execute("select name, credentials from access_proofs").fetchall())
        )

    async def record_gone(self, key: CacheKey) -> None:
        await self._note(lambda db: db.execute("delete from models where key = ?", [key]))

    async def record_attempt(self, attempt: Attempt) -> None:
        row = {
            "key": attempt.key,
            "count": attempt.count,
            "reason": attempt.reason.value,
            "message": attempt.message,
            "retry_at": attempt.retry_at,
        }
        await self._note(lambda db: db.table("attempts").upsert(row, pk="key"))

    async def forgive(self, key: CacheKey) -> None:
        """Forget the failures of a key."""
        await self._note(lambda db: _forgive(db, key))

    async def attempts(self) -> dict[CacheKey, Attempt]:
        return await self._run(_attempts)

    async def record_asked(self, key: CacheKey, asked: Asked) -> None:
        """The desired state asks for this key, or has stopped to."""
        row = [key, asked.owner, asked.retain_seconds, asked.left_at]
        await self._note(
            lambda db: db.execute(
                "insert or replace into asked (key, owner, retain_seconds, left_at)"
                " values (?, ?, ?, ?)",
                row,
            )
        )

    async def forget_asked(self, key: CacheKey) -> None:
        await self._note(lambda db: db.execute("delete from asked where key = ?", [key]))

    async def asked(self) -> dict[CacheKey, Asked]:
        """The keys that were asked for, by whose desired state, and until when."""
        return await self._run(
            lambda db: {
                CacheKey(key): Asked(owner=owner, retain_seconds=retain, left_at=left)
                for key, owner, retain, left in db.execute(
                    "select key, owner, retain_seconds, left_at from asked"
                ).fetchall()
            }
        )

    async def record_past(self, past: Past) -> None:
        """One line of history; what is older than the newest ten thousand goes."""

        def statement(db: Database) -> None:
            row = asdict(past)
            names = ", ".join(row)
            marks = ", ".join("?" * len(row))
            db.execute(f"insert into history ({names}) values ({marks})", list(row.values()))
            db.execute("delete from history where id <= (select max(id) from history) - 10000")

        await self._note(statement)

    async def past(self, key: CacheKey | None = None, *, since: float = 0.0) -> list[Past]:
        """What happened, to one model or to all, the oldest first. `since` is Unix seconds."""
        rows = await self._run(
            lambda db: list(
                db.query(
                    "select * from history where at >= :since and (:key is null or key = :key)"
                    " order by id",
                    {"since": since, "key": key},
                )
            )
        )
        return [Past(**{name: row[name] for name in row if name != "id"}) for row in rows]

    async def record_pod(self, uid: str, result: str, when: float) -> None:
        """A pod was counted. The number outlives the row, which is kept while the pod is there."""

        def statement(db: Database) -> None:
            db.execute("insert or replace into pods values (?, ?, ?)", [uid, result, when])
            db.execute(
                "insert into counts values (?, 1) on conflict do update set pods = pods + 1",
                [result],
            )

        await self._note(statement)

    async def forget_pod(self, uid: str) -> None:
        await self._note(lambda db: db.execute("delete from pods where uid = ?", [uid]))

    async def pods(self) -> tuple[set[str], dict[str, int]]:
        """The pods that were counted and may still be there, and how many there were by result."""

        def statement(db: Database) -> tuple[set[str], dict[str, int]]:
            uids = {uid for (uid,) in db.execute("select uid from pods").fetchall()}
            return uids, dict(db.execute("select result, pods from counts").fetchall())

        return await self._run(statement)

    async def record_bypass(self, uid: str, when: float) -> None:
        """A pod was counted that went past the cache. The row is kept while the pod is there."""
        row = [uid, when]
        await self._note(
            lambda db: db.execute("insert or replace into bypassed values (?, ?)", row)
        )

    async def forget_bypass(self, uid: str) -> None:
        await self._note(lambda db: db.execute("delete from bypassed where uid = ?", [uid]))

    async def bypasses(self, now: float) -> tuple[set[str], float]:
        """The pods that were counted and may still be there, and since when they are counted."""

        def statement(db: Database) -> tuple[set[str], float]:
            db.execute("insert or ignore into counting values ('bypassed', ?)", [now])
            since = db.execute("select since from counting where what = 'bypassed'").fetchone()[0]
            return {uid for (uid,) in db.execute("select uid from bypassed").fetchall()}, since

        return await self._run(statement)

    async def last_uses(self) -> dict[CacheKey, float]:
        """Unix seconds of the last use of each sealed model."""
        return await self._run(
            lambda db: {
                CacheKey(key): used
                for key, used in db.execute("select key, last_used from models").fetchall()
            }
        )

    # -- the one thread -------------------------------------------------------------------------

    async def _note(self, statement: Callable[[Database], object]) -> None:
        """A write that is worth a log line when it fails, and nothing more: files are the truth."""
        try:
            await self._run(statement)
        except AgentError as error:
            _log.warning("%s", error.message)

    async def _run(self, statement: Callable[[Database], _T]) -> _T:
        return await self._call(partial(self._transaction, statement))

    async def _call(self, work: Callable[[], _T]) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError) as error:
            message = f"cannot use the index {self._path}: {error}"
            raise AgentError(Reason.DISK_ERROR, message) from error

    def _transaction(self, statement: Callable[[Database], _T]) -> _T:
        db = self._ready()
        try:
            with db.atomic():
                return statement(db)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            # Somebody wrote into the file, or the disk failed. One new file, one more try; a
            # second failure is the disk's and not the file's.
            self._throw_away(error)
            db = self._ready()
            with db.atomic():
                return statement(db)

    def _ready(self) -> Database:
        if self._db is None:
            self._db = self._open()
        return self._db

    def _open(self) -> Database:
        try:
            return self._connect(self._path)
        except sqlite3.Error as error:
            failure = error
        try:
            # A schema that is not ours is no damage of the file, and as useless to us.
            if _is_damage(failure) or _code(failure) == sqlite3.SQLITE_ERROR:
                self._throw_away(failure)
                return self._connect(self._path)
        except (sqlite3.Error, OSError) as error:
            _log.warning("the damaged index %s cannot be replaced: %s", self._path, error)
        _log.error("cannot open the index %s: %s; it is kept in memory", self._path, failure)
        return self._connect(_MEMORY)

    def _connect(self, path: Path) -> Database:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            db = Database(connection)
            problems = [row[0] for row in db.execute("pragma quick_check").fetchall()]
            if problems != ["ok"]:
                raise _damage("; ".join(problems[:3]))
            db.execute("pragma journal_mode = wal")
            # A lost last transaction costs a last use; a damaged file costs a rebuild. Neither is
            # worth an fsync on every hit.
            db.execute("pragma synchronous = normal")
            migrations.apply(db)
            with db.atomic():
                _adopt(list(self._rebuild()), db)
        except BaseException:
            connection.close()
            raise
        return db

    def _throw_away(self, error: sqlite3.Error) -> None:
        """Aside, over what was put there before: a dying disk must not fill itself with these."""
        self._close()
        aside = self._path.with_name(f"{self._path.name}.damaged")
        _log.error(
            "the index is damaged (%s); it is kept as %s and rebuilt from the manifests",
            error,
            aside,
        )
        for suffix in ("", "-wal", "-shm"):
            part, kept = Path(f"{self._path}{suffix}"), Path(f"{aside}{suffix}")
            kept.unlink(missing_ok=True)
            if part.exists():
                part.replace(kept)

    def _close(self) -> None:
        if self._db is not None:
            self._db.conn.close()
            self._db = None


def _damage(message: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(message)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _code(error: sqlite3.Error) -> int:
    """The primary result code; the bits above it tell variants apart."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def _is_damage(error: sqlite3.Error) -> bool:
    """Not a full disk, and not a lock: those pass, and must not cost us the file."""
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _adopt(entries: list[Entry], db: Database) -> None:
    keys = {entry.key for entry in entries}
    for (key,) in db.execute("select key from models").fetchall():
        if key not in keys:
            db.execute("delete from models where key = ?", [key])
    for entry in entries:
        _upsert(db, entry)


def _upsert(db: Database, entry: Entry) -> None:
    """Insert, or bring up to date: uses stay, and the later of the two last uses counts."""
    db.execute(
        """
        insert into models (key, uri, revision, fingerprint, bytes, sealed_at, last_used)
        values (?, ?, ?, ?, ?, ?, ?)
        on conflict (key) do update set
            uri = excluded.uri, revision = excluded.revision, fingerprint = excluded.fingerprint,
            bytes = excluded.bytes, sealed_at = excluded.sealed_at,
            last_used = max(last_used, excluded.last_used)
        """,
        [
            entry.key,
            entry.ref.uri,
            entry.revision,
            entry.fingerprint,
            entry.bytes,
            entry.sealed_at,
            entry.last_used,
        ],
    )


def _forgive(db: Database, key: CacheKey) -> None:
    db.execute("delete from attempts where key = ?", [key])


def _attempts(db: Database) -> dict[CacheKey, Attempt]:
    rows = cast("list[dict[str, Any]]", list(db.query("select * from attempts")))
    known = {reason.value for reason in Reason}
    return {
        CacheKey(row["key"]): Attempt(
            key=CacheKey(row["key"]),
            count=row["count"],
            reason=Reason(row["reason"]),
            message=row["message"],
            retry_at=row["retry_at"],
        )
        for row in rows
        if row["reason"] in known  # a newer version's word means nothing here: just try again
    }
