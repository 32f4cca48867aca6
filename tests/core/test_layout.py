"""Names: ours on disk, and those a hub would like us to make there."""

import posixpath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent import layout
from agent.errors import AgentError, Reason
from agent.model import CacheKey, cache_key

KEY = CacheKey("0123456789abcdef")

HOSTILE = {
    "up and out": "../../x",
    "up from below": "a/../../x",
    "up and back": "a/../b",
    "the parent": "..",
    "the directory itself": ".",
    "a dot on the way": "a/./b",
    "absolute": "/etc/x",
    "doubly absolute": "//etc/x",
    "empty": "",
    "an empty segment": "a//b",
    "a directory": "a/",
    "NUL": "a\0b",
    "a new line": "a\nb",
    "a carriage return": "a\rb",
    "an escape sequence": "a\x1b[2Jb",
    "delete": "a\x7f",
    "a control character of Latin-1": "a\x85b",
    "a line separator": "a\u2028b",
    "a backslash": "a\\b",
    "a way up on another system": "..\\..\\x",
    "half a surrogate pair": "a\ud800b",
    "right to left": "model\u202egpj.bin",
    "a name too long": "a" * 256,
    "a name too long in bytes": "\u4e2d" * 86,
    "a path too long": "/".join(["abcdefg"] * 200),
    "standard input": "-",
}

HARMLESS = [
    "config.json",
    "model-00001-of-00002.safetensors",
    ".gitattributes",
    "...",
    "..a/b..",
    "-/-",
    "-rf",
    "a b/c  d",
    " leading and trailing ",
    "# file",
    "*",
    "~root",
    "$(id)",
    "Modell-größe.bin",
    "模型/权重.bin",
    "e\u0301.bin",  # not normalised: two names that look alike are two files
    "Screenshot 2026-01-01 at 9.41.00\u202fAM.png",  # as macOS writes it
    "👩\u200d💻.md",
    "a" * 255,
    "\u4e2d" * 85,
]


# -- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_names_are_refused(path: str) -> None:
    assert layout.unsafe(path) is not None
    with pytest.raises(AgentError) as caught:
        layout.check_paths(["fine", path])
    assert caught.value.reason is Reason.UNSAFE_PATH
    assert caught.value.message.isascii(), "it goes into a log and a terminal"
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 600


@pytest.mark.parametrize("path", HARMLESS, ids=ascii)
def test_odd_but_harmless_names_pass(path: str) -> None:
    assert layout.unsafe(path) is None
    layout.check_paths([path])


def test_all_harmless_names_can_lie_side_by_side() -> None:
    layout.check_paths(HARMLESS)
    layout.check_paths([])


@pytest.mark.parametrize(
    "paths",
    [
        ["a", "a/b"],
        ["a/b", "a"],
        ["a/b/c", "x", "a/b"],
        ["a", "a.b", "a/b"],  # not neighbours when sorted
    ],
)
def test_a_file_cannot_be_a_directory_too(paths: list[str]) -> None:
    with pytest.raises(AgentError, match="both as a file and a directory") as caught:
        layout.check_paths(paths)
    assert caught.value.reason is Reason.UNSAFE_PATH


def test_the_same_name_twice_is_refused() -> None:
    with pytest.raises(AgentError, match="'a/b', which is listed twice") as caught:
        layout.check_paths(["a/b", "a/c", "a/b"])
    assert caught.value.reason is Reason.UNSAFE_PATH


def test_names_that_begin_alike_are_no_conflict() -> None:
    layout.check_paths(["a/b", "a/bc", "ab", "a.b", "b"])


_SEGMENTS = st.one_of(
    st.sampled_from(["", ".", "..", "~", "a", "b", "\0", "\\", " ", "...", "-", "\u202e"]),
    st.text(st.characters(exclude_characters="/"), max_size=6),
)
_PATHS = st.one_of(st.lists(_SEGMENTS, max_size=5).map("/".join), st.text(max_size=12))


@given(_PATHS)
@example("a/../../..")
def test_what_passes_stays_below_the_root(path: str) -> None:
    if layout.unsafe(path) is not None:
        return
    joined = posixpath.join("/models/0123456789abcdef", path)
    assert posixpath.normpath(joined) == joined, "no way round, and nothing that is dropped"
    assert joined.startswith("/models/0123456789abcdef/")
    assert path.encode().decode() == path
    assert not set(path) & set("\0\n\r\\")


def _refusal(paths: list[str]) -> AgentError | None:
    try:
        layout.check_paths(paths)
    except AgentError as error:
        return error
    return None


@given(st.lists(_PATHS, max_size=6))
def test_what_passes_together_can_be_made_together(paths: list[str]) -> None:
    """Carried out on a tree of dictionaries, as a file system would."""
    refusal = _refusal(paths)
    if refusal is not None:
        assert refusal.reason is Reason.UNSAFE_PATH
        assert refusal.message.isascii()
        return
    root: dict[str, object] = {}
    for path in paths:
        *directories, name = path.split("/")
        here = root
        for directory in directories:
            below = here.setdefault(directory, {})
            assert isinstance(below, dict), "a file is in the way"
            here = below
        assert name not in here
        here[name] = "file"


@given(st.text(max_size=8), st.text(max_size=8))
def test_whatever_is_hidden_in_a_name_the_gate_sees_it(before: str, after: str) -> None:
    for hidden in ("\n", "\0", "\x1b", "\\", "/../", "\u2028", "\ud800", "\u202e"):
        assert layout.unsafe(before + hidden + after) is not None


# -- our own names -------------------------------------------------------------------------------


def test_the_names_of_one_key_are_all_different_and_below_the_mount() -> None:
    makers = (
        layout.model,
        layout.manifest,
        layout.sealing,
        layout.retiring,
        layout.progress,
        layout.ingest,
    )
    names = [maker(KEY) for maker in makers]
    assert len(set(names)) == len(names)
    assert all(layout.unsafe(name) is None for name in names)
    assert names[0] == "models/0123456789abcdef"
    assert all(name.startswith(".localmodel/") for name in names[1:])


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (layout.manifest(KEY), "manifest"),
        (layout.sealing(KEY), "sealing"),
        (layout.retiring(KEY), "retiring"),
    ],
)
def test_a_note_is_recognised_by_its_name(path: str, kind: str) -> None:
    assert layout.key_of_manifest(posixpath.basename(path)) == (KEY, kind)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lost+found",
        "0123456789ABCDEF",
        "0123456789abcde",
        "0123456789abcdef0",
        "0123456789abcde\u0661",  # a digit to str.isdigit
        "0123456789abcdef.sealing",
        ".0123456789abcdef",
        ".0123456789abcdef.new",
        ".0123456789abcdef.sealing.new",
        "x.0123456789abcdef.sealing",
        ".0123456789abcdeg.sealing",
    ],
)
def test_any_other_name_is_no_note_of_ours(name: str) -> None:
    assert layout.key_of_manifest(name) is None
    assert not layout.is_key(name)


@given(st.text())
def test_every_uri_has_a_key_that_is_one(uri: str) -> None:
    assert layout.is_key(cache_key(uri))
