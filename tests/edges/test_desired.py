"""A directory of YAML as desired state: every reading, and what is kept when one fails."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.desired import DesiredDirectory
from agent.wishes import Desired
from tests.machine import cache_yaml, replace

URI = "hf://acme/tiny"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "desired"
    path.mkdir()
    return path


def _uris(desired: Desired) -> dict[str, str]:
    return {name: desired.wants[key].ref.uri for name, key in desired.names.items()}


def _documents(*texts: str) -> str:
    return "\n---\n".join(texts)


def test_files_are_read_by_their_suffix_and_may_hold_several_documents(directory: Path) -> None:
    (directory / "a.yaml").write_text(
        _documents("", cache_yaml("a1", "file:///1"), "# nothing", cache_yaml("a2", "file:///2"))
    )
    (directory / "b.yml").write_text(cache_yaml("b", "file:///3"))
    for ignored in ("c.json", ".hidden.yaml", "d.yaml~", "status"):
        (directory / ignored).write_text(cache_yaml("x", "file:///x"))
    found = DesiredDirectory(directory).read()
    assert _uris(found) == {"a1": "file:///1", "a2": "file:///2", "b": "file:///3"}
    assert found.errors == ()


def test_one_bad_document_does_not_take_the_others_with_it(directory: Path) -> None:
    bad = cache_yaml("b", URI).replace("LocalModelCache", "Secret")
    text = _documents(cache_yaml("a", "file:///1"), bad, cache_yaml("c", "file:///3"))
    (directory / "all.yaml").write_text(text)
    found = DesiredDirectory(directory).read()
    assert _uris(found) == {"a": "file:///1", "c": "file:///3"}
    (error,) = found.errors
    assert error.name == "b"
    line = text.splitlines().index("---") + 2
    assert error.message.startswith(f"all.yaml line {line}: kind is 'Secret'")


def test_what_a_file_held_stays_wanted_while_it_cannot_be_read(directory: Path) -> None:
    path = directory / "all.yaml"
    watched = DesiredDirectory(directory)
    replace(path, _documents(cache_yaml("a", "file:///1"), cache_yaml("b", "file:///2")))
    assert _uris(watched.read()) == {"a": "file:///1", "b": "file:///2"}

    # Broken behind a document that changed: the new one counts, the hidden one is kept.
    replace(path, _documents(cache_yaml("a", "file:///new"), "{"))
    found = watched.read()
    assert _uris(found) == {"a": "file:///new", "b": "file:///2"}
    assert [error.name for error in found.errors] == ["all"]

    # A document that is there and wrong is not a document that went away.
    replace(path, _documents(cache_yaml("a", "file:///new"), cache_yaml("b", "")))
    found = watched.read()
    assert _uris(found) == {"a": "file:///new", "b": "file:///2"}
    assert [error.name for error in found.errors] == ["b"]

    replace(path, cache_yaml("a", "file:///new"))
    assert _uris(watched.read()) == {"a": "file:///new"}
    path.unlink()
    assert _uris(watched.read()) == {}


def test_a_directory_that_goes_away_is_no_wish_to_drop_everything(directory: Path) -> None:
    watched = DesiredDirectory(directory)
    (directory / "a.yaml").write_text(cache_yaml("a", URI))
    watched.read()
    directory.rename(directory.with_name("elsewhere"))
    found = watched.read()
    assert _uris(found) == {"a": URI}
    assert "the last known state is kept" in found.errors[0].message


def test_what_is_no_file_is_named_and_does_not_hang_us(directory: Path) -> None:
    (directory / "folder.yaml").mkdir()
    os.mkfifo(directory / "fifo.yaml")
    (directory / "loop.yaml").symlink_to("loop.yaml")
    (directory / "latin.yaml").write_bytes(b"name: \xff\xfe\n")
    found = DesiredDirectory(directory).read()
    assert {error.name for error in found.errors} == {"folder", "fifo", "loop", "latin"}
    assert all("cannot be read" in error.message for error in found.errors)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: {", "not YAML: "),
        ("created: 2026-99-99", "a value does not fit its type"),
        ("a: \x00", "not YAML: "),
        ("!!python/object:os.system {}", "not YAML: "),
        ("!!bool x", "a value does not fit its type"),
        ("!!int ''", "a value does not fit its type"),
        ("!!timestamp x", "a value does not fit its type"),
        ("a: &a [*a]", "the document is not an object|apiVersion|not YAML"),
        ("[" * 3000, "not YAML: "),
        ("just text", "the document is not an object"),
        ("- a\n- list", "the document is not an object"),
        ("a: 1\na: 2", "apiVersion is of type NoneType"),
    ],
    ids=range(12),
)
def test_whatever_is_in_a_file_it_is_an_error_of_that_file(
    directory: Path, text: str, says: str
) -> None:
    (directory / "x.yaml").write_text(text)
    (directory / "good.yaml").write_text(cache_yaml("good", URI))
    found = DesiredDirectory(directory).read()
    assert _uris(found) == {"good": URI}
    (error,) = found.errors
    assert error.name == "x"
    assert error.message.startswith("x.yaml line 1: ")
    assert any(part in error.message for part in says.split("|"))


@given(st.text(alphabet=st.sampled_from("ab:-{}[]&*!'\"#%@`,|>? \n\t\0\x85é0.~")))
def test_no_text_makes_reading_fail(text: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "x.yaml").write_text(text)
        found = DesiredDirectory(Path(name)).read()
        assert found.wants == {}
        assert all(error.name == "x" for error in found.errors)


def test_the_same_uri_and_the_same_name_twice(directory: Path) -> None:
    (directory / "1.yaml").write_text(cache_yaml("one", URI, priority="1"))
    (directory / "2.yaml").write_text(cache_yaml("two", URI, priority="7"))
    (directory / "3.yaml").write_text(cache_yaml("three", URI, exclude="*.md"))
    (directory / "4.yaml").write_text(cache_yaml("one", "file:///other"))
    found = DesiredDirectory(directory).read()
    (want,) = found.wants.values()
    assert want.names == {"one", "two"}
    assert want.priority == 7
    assert [error.name for error in found.errors] == ["three", "one"]
    assert "3.yaml: three and one, two want" in found.errors[0].message
    assert "4.yaml: there is already a LocalModelCache one" in found.errors[1].message


def test_an_unchanged_directory_is_not_parsed_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "a.yaml").write_text(json.dumps({"not": "a cache"}))
    watched = DesiredDirectory(directory)
    before = watched.read()
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("read again"))
    assert watched.read() == before


def test_a_bomb_of_aliases_is_a_refusal_and_not_an_outage(tmp_path: Path) -> None:
    """Nine levels of nine: a kilobyte that would be gigabytes in memory or in a message."""
    levels = ["a0: &a0 x"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text("\n".join([*levels, "apiVersion: *a9"]) + "\n")
    merges = ["x0: &m0 {a: 1}"]
    merges += [f"x{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, 29)]
    (tmp_path / "merge.yaml").write_text("\n".join(merges) + "\n")
    found = DesiredDirectory(tmp_path).read()
    assert {error.name: error.message for error in found.errors} == {
        "bomb": "bomb.yaml line 2: not YAML: aliases are not supported",
        "merge": "merge.yaml line 2: not YAML: aliases are not supported",
    }


def test_a_file_too_large_to_be_meant_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_text("# " + "x" * 1024 * 1024)
    (error,) = DesiredDirectory(tmp_path).read().errors
    assert "larger than 1048576 bytes" in error.message or "too large" in error.message.lower()
