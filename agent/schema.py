"""The tables of the index, as migrations: each applied once, in this order, and never changed."""

from sqlite_utils import Database, Migrations

migrations = Migrations("localmodel-index")


@migrations()
def models_and_attempts(db: Database) -> None:
    db.execute(
        """
        create table models (
            key text primary key,
            uri text not null,
            revision text not null,
            fingerprint text not null,
            bytes integer not null,
            sealed_at real not null,
            last_used real not null,
            uses integer not null default 0
        ) strict
        """
    )
    # The least recently used first, as eviction asks for them.
    db.execute("create index models_lru on models (last_used, sealed_at, key)")
    db.execute(
        """
        create table attempts (
            key text primary key,
            count integer not null,
            reason text not null,
            message text not null,
            retry_at real not null
        ) strict
        """
    )


@migrations()
def asked_and_pods(db: Database) -> None:
    db.execute("create table asked (key text primary key, owner text not null) strict")
    db.execute(
        "create table pods (uid text primary key, result text not null, seen_at real not null)"
        " strict"
    )
    db.execute("create table counts (result text primary key, pods integer not null) strict")


@migrations()
def history_and_leaving(db: Database) -> None:
    db.execute("alter table asked add column retain_seconds real")
    db.execute("alter table asked add column left_at real")
    db.execute(
        """
        create table history (
            id integer primary key,
            at real not null,
            key text not null,
            uri text not null,
            what text not null,
            why text not null,
            bytes integer not null,
            age_seconds real,
            idle_seconds real
        ) strict
        """
    )
    db.execute("create index history_of_key on history (key, id)")


@migrations()
def proofs(db: Database) -> None:
    db.execute("alter table models add column proven_at real not null default 0")


@migrations()
def refreshes(db: Database) -> None:
    db.execute("create table refreshed (key text primary key, token text not null) strict")


@migrations()
def access_proofs(db: Database) -> None:
    db.execute(
        "create table access_proofs (name text primary key, credentials text not null,"
        " at real not null) strict"
    )


@migrations()
def bypasses(db: Database) -> None:
    db.execute("create table bypassed (uid text primary key, seen_at real not null) strict")
    db.execute("create table counting (what text primary key, since real not null) strict")
