"""What a LocalModelNode asks of its node."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent.errors import Reason
from agent.kube import parse
from agent.kube.parse import CacheMeta, Group, NodeObject
from agent.model import CacheKey, FilePolicy, ModelRef, cache_key
from agent.sources import scheme_of
from agent.wishes import Desired, SpecError, join, of_node

URI, OTHER = "hf://acme/tiny", "hf://acme/other"
KEY = cache_key(URI)
SERVED = "/models"


def node(*entries: dict[str, Any]) -> NodeObject:
    return parse.node(
        {"metadata": {"name": "n", "uid": "u"}, "spec": {"localModels": list(entries)}}
    )


def entry(name: str, uri: str | None = URI, **fields: Any) -> dict[str, Any]:
    return {"modelName": name, "sourceModelUri": uri, **fields}


def caches(*metas: tuple[str, str, dict[str, str]]) -> dict[tuple[str, str], CacheMeta]:
    """From `namespace/name`, when each was created, and its annotations without our prefix."""
    found = {}
    for where, created, notes in metas:
        namespace, _, name = where.rpartition("/")
        found[namespace, name] = CacheMeta(
            kind="LocalModelCache",
            namespace=namespace,
            name=name,
            uid=where,
            created=created,
            annotations={f"localmodel-agent.io/{k}": v for k, v in notes.items()},
        )
    return found


def desired(
    found: NodeObject | None,
    known: dict[tuple[str, str], CacheMeta] | None = None,
    groups: dict[str, Group] | None = None,
    containers: Any = None,
) -> Desired:
    return of_node(
        found, known or {}, groups or {}, check=scheme_of, served=SERVED, containers=containers
    )


def errors(found: Desired) -> dict[str, Reason]:
    return {error.name: error.reason for error in found.errors}


def test_no_object_says_nothing_and_absence_is_no_command() -> None:
    found = desired(None)
    assert not found.wants
    assert not found.complete


def test_an_empty_object_says_that_nothing_is_wanted() -> None:
    found = desired(node())
    assert (found.wants, found.names, found.errors, found.spoken_for) == ({}, {}, (), frozenset())
    assert found.complete


def test_9_1_2_fields_of_a_newer_kserve_change_nothing() -> None:
    newer: dict[str, Any] = {
        "pvcRef": {"name": "x"},
        "imagePullSecrets": [{"name": "x"}],
        "anything": [1],
    }
    found = desired(node(entry("a", **newer)))
    assert found == desired(node(entry("a")))


def test_9_1_6_the_same_model_by_several_names_is_one_want() -> None:
    known = caches(("a", "1", {"priority": "1"}), ("team/a", "2", {"priority": "7"}))
    found = desired(node(entry("a"), entry("a", namespace="team")), known)
    assert found.names == {"a": KEY, "team/a": KEY}
    assert found.wants[KEY].names == {"a", "team/a"}
    assert found.wants[KEY].priority == 7


def test_annotations_are_those_of_the_entrys_own_cache() -> None:
    known = caches(("a", "1", {"include": "*.json"}), ("team/a", "1", {"include": "*.txt"}))
    found = desired(node(entry("a"), entry("a", OTHER, namespace="team")), known)
    assert found.wants[KEY].ref == ModelRef(uri=URI, include=("*.json",))
    assert found.wants[cache_key(OTHER)].ref == ModelRef(uri=OTHER, include=("*.txt",))


def _containers(allow: str, ignore: str = "") -> dict[str, Any]:
    variables = {"STORAGE_ALLOW_PATTERNS": allow, "STORAGE_IGNORE_PATTERNS": ignore}
    env = [{"name": name, "value": value} for name, value in variables.items()]
    formats = [{"prefix": "hf://acme/"}]
    spec = {"workloadType": "localModelDownloadJob", "supportedUriFormats": formats}
    return {"items": [{"metadata": {"name": "c"}, "spec": {**spec, "container": {"env": env}}}]}


def test_9_1_12_patterns_of_a_storage_container_are_those_of_its_caches() -> None:
    found = desired(node(entry("a"), entry("b")), containers=_containers("*.json,*.bin", "x.bin"))
    assert found.wants[KEY].ref == ModelRef(
        uri=URI, include=("*.json", "*.bin"), exclude=("x.bin",)
    )
    assert found.wants[KEY].names == {"a", "b"}


def test_an_annotation_wins_over_the_pattern_of_its_kind_and_an_empty_one_lifts_it() -> None:
    containers = _containers("*.json", "x.json")
    known = caches(("a", "1", {"include": "*.bin"}), ("b", "1", {"exclude": ""}))
    one = desired(node(entry("a")), known, containers=containers)
    assert one.wants[KEY].ref == ModelRef(uri=URI, include=("*.bin",), exclude=("x.json",))
    other = desired(node(entry("b")), known, containers=containers)
    assert other.wants[KEY].ref == ModelRef(uri=URI, include=("*.json",))
    both = desired(node(entry("a"), entry("b")), known, containers=containers)
    assert errors(both) == {"b": Reason.INVALID_SPEC}


def test_patterns_that_cannot_be_read_refuse_their_caches_and_remove_nothing() -> None:
    found = desired(node(entry("a")), containers=_containers("[1]"))
    assert errors(found) == {"a": Reason.UNAUTHORIZED}
    assert found.wants == {}
    assert found.spoken_for == {KEY}


def test_an_entry_whose_cache_is_gone_is_served_as_it_says() -> None:
    """KServe's controller may delete the cache first, and a finalizer keep the entry."""
    assert desired(node(entry("zombie"))).wants[KEY].ref == ModelRef(uri=URI)


def test_of_two_that_disagree_the_older_wins_whatever_their_order_and_names() -> None:
    notes = [{"include": "*.json"}, {"include": "*.txt"}]
    for young, old in (("a", "b"), ("b", "a")):
        known = caches((young, "2026-02", notes[0]), (old, "2026-01", notes[1]))
        for entries in ([entry("a"), entry("b")], [entry("b"), entry("a")]):
            found = desired(node(*entries), known)
            assert found.names == {old: KEY}
            assert found.wants[KEY].ref.include == ("*.txt",)
            assert errors(found) == {young: Reason.INVALID_SPEC}
            assert old in found.errors[0].message
            assert found.complete


def test_fingerprints_that_disagree_are_a_conflict_too() -> None:
    one, two = ({"expect-fingerprint": f"sha256:{digit * 64}"} for digit in "ab")
    found = desired(node(entry("a"), entry("b")), caches(("a", "1", one), ("b", "2", two)))
    assert found.names == {"a": KEY}
    assert errors(found) == {"b": Reason.INVALID_SPEC}


def test_a_bad_annotation_refuses_its_entry_and_its_model_is_not_ours_to_remove() -> None:
    known = caches(("a", "1", {"priority": "high"}))
    found = desired(node(entry("a"), entry("b", OTHER)), known)
    assert set(found.wants) == {cache_key(OTHER)}
    assert errors(found) == {"a": Reason.INVALID_SPEC}
    assert found.spoken_for == {KEY}
    assert found.complete


def test_an_entry_without_a_uri_may_mean_any_model() -> None:
    for uri in (None, "", "hf://a/b\n"):
        found = desired(node(entry("a", uri), entry("b", OTHER)))
        assert errors(found) == {"a": Reason.INVALID_SPEC}
        assert set(found.wants) == {cache_key(OTHER)}
        assert not found.complete, "so nothing counts as having left"


def test_9_1_13_a_scheme_that_no_source_knows_is_refused_and_wants_nothing() -> None:
    found = desired(node(entry("a", "gopher://x/y"), entry("b", OTHER), entry("c", "/etc")))
    assert errors(found) == {"a": Reason.UNSUPPORTED, "c": Reason.UNSUPPORTED}
    assert "gopher://" in found.errors[0].message
    assert set(found.wants) == {cache_key(OTHER)}
    assert cache_key("gopher://x/y") in found.spoken_for, "another agent may have brought it"
    assert found.complete


def test_a_group_at_another_path_is_a_mismatch_that_names_both() -> None:
    groups = {"gpu": Group(name="gpu", path="/elsewhere")}
    found = desired(node(entry("a", nodeGroup="gpu"), entry("b", OTHER)), groups=groups)
    assert errors(found) == {"a": Reason.PATH_MISMATCH}
    assert "/elsewhere" in found.errors[0].message
    assert SERVED in found.errors[0].message
    assert found.spoken_for == {KEY}, "an edit of a group is no wish to lose a model"


def test_a_group_that_is_here_or_has_no_path_or_is_unknown_is_no_mismatch() -> None:
    for path in ("/models", "/models/", ""):
        groups = {"gpu": Group(name="gpu", path=path)}
        assert desired(node(entry("a", nodeGroup="gpu")), groups=groups).names == {"a": KEY}
    assert desired(node(entry("a", nodeGroup="unknown"))).names == {"a": KEY}


def test_the_file_policy_is_the_strictest_of_its_groups() -> None:
    groups = {
        "lax": Group(name="lax", path="", file_policy=FilePolicy.OFF),
        "strict": Group(name="strict", path="", file_policy=FilePolicy.REFUSE),
        "silent": Group(name="silent", path=""),
    }

    def policy(*names: str) -> FilePolicy | None:
        entries = (entry(f"c-{name}", nodeGroup=name) for name in names)
        (want,) = desired(node(*entries), groups=groups).wants.values()
        return want.file_policy

    assert policy("lax") is FilePolicy.OFF
    assert policy("strict", "lax") is policy("lax", "strict") is FilePolicy.REFUSE
    assert policy("silent") is policy("gone") is None  # what the agent says


def test_two_caches_of_one_name_are_one_and_an_error() -> None:
    first = parse.Cache(name="a", want=parse.want(URI, "a", {}))
    again = parse.Cache(name="a", want=parse.want(OTHER, "a", {}))
    found = join([("a.yaml", first), ("b.yaml", again)], [SpecError(name="c", message="bad")])
    assert found.names == {"a": KEY}
    assert [error.name for error in found.errors] == ["c", "a"]
    assert found.errors[1].message.startswith("b.yaml: ")


_NOTES = st.fixed_dictionaries(
    {},
    optional={
        "include": st.sampled_from(["*.json", "*.txt", "a\nb"]),
        "priority": st.sampled_from(["1", "x"]),
    },
)
_ENTRIES = st.lists(
    st.tuples(
        st.sampled_from("abcde"),
        st.sampled_from([URI, OTHER, ""]),
        st.sampled_from(["gpu", "far"]),
        _NOTES,
        st.sampled_from(["1", "2"]),
    ),
    max_size=6,
    unique_by=lambda item: item[0],
)


@given(_ENTRIES, st.randoms(use_true_random=False))
def test_every_entry_is_asked_for_or_refused_in_any_order(entries: Any, random: Any) -> None:
    known = caches(*((name, created, notes) for name, _, _, notes, created in entries))
    groups = {"gpu": Group(name="gpu", path=SERVED), "far": Group(name="far", path="/far")}
    raw = [entry(name, uri, nodeGroup=group) for name, uri, group, *_ in entries]
    found = desired(node(*raw), known, groups)
    names = [*found.names, *(error.name for error in found.errors)]
    assert sorted(names) == sorted(name for name, *_ in entries)
    assert set(found.names.values()) == set(found.wants)
    # Nothing that an entry names may count as having left.
    spoken: set[CacheKey] = set(found.wants) | found.spoken_for
    assert spoken >= {cache_key(uri) for _, uri, *_ in entries if uri}
    assert found.complete == all(uri for _, uri, *_ in entries)
    random.shuffle(raw)
    again = desired(node(*raw), known, groups)
    assert (again.wants, again.names) == (found.wants, found.names)


def test_a_cache_of_a_namespace_that_names_credentials_must_show_them() -> None:
    """Design D12; each with its own, though the older one's bring the model."""
    found = desired(
        node(
            entry("common", storage={"key": "k"}),
            entry("open", namespace="team-a"),
            entry("mine", namespace="team-a", serviceAccountName="sa"),
            entry("other", namespace="team-b", storage={"key": "k"}),
            entry("empty", namespace="team-b", storage={"parameters": {"type": "hf"}}),
            entry("refused", "ftp://x/y", namespace="team-b", serviceAccountName="sa"),
        )
    )
    assert set(found.guarded) == {"team-a/mine", "team-b/other", "team-b/empty"}
    assert '"serviceAccountName": "sa"' in found.guarded["team-a/mine"].access
    assert found.wants[KEY].access != found.guarded["team-a/mine"].access
    assert {want.ref for want in found.guarded.values()} == {found.wants[KEY].ref}


def test_what_is_wrong_with_an_entry_is_known_by_its_key() -> None:
    """Who waits for the model knows only that."""
    found = node(entry("a", "gopher://x"), entry("b", nodeGroup="gpu"), entry("c", OTHER))
    groups = {"gpu": Group(name="gpu", path="/elsewhere")}
    wished = desired(found, groups=groups)
    assert {key: error.name for key, error in wished.refused.items()} == {
        cache_key("gopher://x"): "a",
        KEY: "b",
    }
    assert wished.refused[KEY].reason is Reason.PATH_MISMATCH
    # Whose cache may just not have been heard of is neither wanted nor refused.
    unclear = of_node(found, {}, groups, unconfirmed={"b"}, check=scheme_of, served=SERVED)
    assert KEY in unclear.spoken_for
    assert KEY not in unclear.refused
