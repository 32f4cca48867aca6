"""The manifest against itself, against coreutils, and against whatever else may lie there."""

import hashlib
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from agent import layout, manifest, pinned
from agent.errors import AgentError, Reason
from agent.manifest import Manifest, SealedArchive, SealedFile
from agent.model import Digest, Listing, ModelRef, RemoteFile, cache_key

CONTENTS = {
    "config.json": b"{}",
    "# file": b"looks like a comment",
    "# file 3 - config.json": b"looks like one of ours",
    " leading": b"a space before",
    "trailing ": b"a space behind",
    "two  spaces": b"as between digest and name",
    "*binary": b"as sha256sum -b marks it",
    "empty": b"",
    "SHA256 (x) = 00": b"as sha256sum --tag writes",
    "größe/模型/👩\u200d💻.bin": b"beyond ASCII",
    "dash/-": b"not the standard input",
    "9.41.00\u202fAM.png": b"a space that is none",
}


# -- generated manifests -------------------------------------------------------------------------


def _is_safe(path: str) -> bool:
    return layout.unsafe(path) is None


_LINES = st.text(max_size=20).filter(layout.is_one_line)
_SEGMENTS = st.one_of(
    st.sampled_from(["# file", "# uri", " ", "a b", " a", "a ", "*", "-", "é", "模", "\u202f"]),
    st.text(min_size=1, max_size=8),
)
_PATHS = st.lists(_SEGMENTS, min_size=1, max_size=3).map("/".join).filter(_is_safe)
_SHA256 = st.binary(min_size=32, max_size=32).map(bytes.hex)
_PROMISES = st.one_of(
    st.none(),
    _SHA256.map(lambda hex: Digest("sha256", hex)),
    _SHA256.map(lambda hex: Digest("git-sha1", hex[:40])),
)


_ARCHIVES = st.builds(
    SealedArchive, path=_LINES.filter(bool), size=st.integers(0, 2**50), sha256=_SHA256
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    paths = draw(st.lists(_PATHS, min_size=1, max_size=5, unique=True))
    try:
        layout.check_paths(paths)
    except AgentError:
        assume(False)
    return Manifest(
        ref=ModelRef(
            uri=draw(_LINES),
            include=tuple(draw(st.lists(_LINES, max_size=2))),
            exclude=tuple(draw(st.lists(_LINES, max_size=2))),
        ),
        revision=draw(_LINES),
        sealed_at=draw(st.integers(10**9, 4 * 10**9)),
        files=tuple(
            SealedFile(
                path=path,
                size=draw(st.integers(0, 2**50)),
                sha256=draw(_SHA256),
                promised=draw(_PROMISES),
            )
            for path in sorted(paths, key=str.encode)
        ),
        archive=draw(st.none() | _ARCHIVES),
        warnings=tuple(draw(st.lists(_LINES, max_size=2))),
    )


@given(manifests())
def test_the_text_round_trips(found: Manifest) -> None:
    text = manifest.render(found)
    again = manifest.parse(text)
    assert again == found
    assert manifest.render(again) == text
    assert again.fingerprint == found.fingerprint
    assert text.encode().decode() == text


@given(manifests(), st.data())
def test_a_text_that_was_cut_off_is_refused(found: Manifest, data: st.DataObject) -> None:
    text = manifest.render(found)
    length = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(AgentError) as caught:
        manifest.parse(text[:length])
    assert caught.value.reason is Reason.INVALID_SPEC


@given(manifests())
def test_a_text_without_one_of_its_lines_is_refused(found: Manifest) -> None:
    """Except for a pattern, a warning, or the archive: there is no telling that it was there."""
    lines = manifest.render(found).splitlines(keepends=True)
    patterns = len(found.ref.include) + len(found.ref.exclude)
    assume("".join(lines).count("\n") == len(lines))  # splitlines knows more line ends than \n
    sealed = 3 + patterns
    behind = sealed + 1 + len(found.warnings) + (found.archive is not None)
    for number in (*range(3), sealed, *range(behind, len(lines))):
        with pytest.raises(AgentError):
            manifest.parse("".join(lines[:number] + lines[number + 1 :]))


@given(manifests())
def test_a_text_with_a_file_or_digest_line_twice_is_refused(found: Manifest) -> None:
    lines = manifest.render(found).split("\n")[:-1]
    for line in lines[-len(found.files) :]:
        other = ("0" if line[0] != "0" else "1") + line[1:]
        for more in (line, other):
            with pytest.raises(AgentError):
                manifest.parse("\n".join((*lines, more, "")))


@given(manifests(), st.data())
def test_garbled_text_is_refused_or_understood_but_never_breaks(
    found: Manifest, data: st.DataObject
) -> None:
    text = manifest.render(found)
    at = data.draw(st.integers(0, len(text) - 1))
    end = at + data.draw(st.integers(0, 3))
    garbled = text[:at] + data.draw(st.text(max_size=3)) + text[end:]
    other = _understood(garbled)
    if other is not None:  # it could have been written, though not by us
        assert manifest.parse(manifest.render(other)) == other
        assert other.files
        layout.check_paths(file.path for file in other.files)


@given(st.text())
@example("")
@example("\n")
@example("# localmodel manifest 1\n")
@example("# localmodel manifest 2\n")
@example("# localmodel manifest 1\n# uri a\n# revision b\n# sealed 2026-11-21T07:35:20Z\n")
def test_any_text_is_refused_and_never_breaks(text: str) -> None:
    for attempt in (text, f"# localmodel manifest 1\n{text}", f"# localmodel manifest 1\n{text}\n"):
        with pytest.raises(AgentError) as caught:
            manifest.parse(attempt)
        assert caught.value.reason is Reason.INVALID_SPEC


def _understood(text: str) -> Manifest | None:
    try:
        return manifest.parse(text)
    except AgentError as error:
        if error.reason not in (Reason.INVALID_SPEC, Reason.UNSAFE_PATH):
            raise
    return None


# -- single texts --------------------------------------------------------------------------------


def _sealed(contents: dict[str, bytes], **ref: str) -> Manifest:
    listing = Listing(
        ref=ModelRef(uri=ref.get("uri", "hf://acme/tiny")),
        revision=ref.get("revision", "0a1b"),
        files=tuple(
            RemoteFile(path=path, size=len(data), origin=path) for path, data in contents.items()
        ),
    )
    digests = {path: hashlib.sha256(data).hexdigest() for path, data in contents.items()}
    return manifest.seal(listing, digests, sealed_at=1_700_000_000)


TEXT = """\
# localmodel manifest 1
# uri hf://acme/tiny
# revision 0a1b
# include *.json
# sealed 2023-11-14T22:13:20Z
# file 2 git-sha1:9e26dfeeb6e641a33dae4961196235bdb965b21b a.json
# file 0 - b c
44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a  a.json
e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  b c
"""


def test_a_text_means_what_it_says() -> None:
    found = manifest.parse(TEXT)
    assert found.ref == ModelRef(uri="hf://acme/tiny", include=("*.json",))
    assert (found.revision, found.sealed_at, found.bytes) == ("0a1b", 1_700_000_000, 2)
    assert [file.path for file in found.files] == ["a.json", "b c"]
    assert found.files[0].promised == Digest("git-sha1", "9e26dfeeb6e641a33dae4961196235bdb965b21b")
    assert found.files[1].promised is None
    assert manifest.render(found) == TEXT


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("manifest 1", "manifest 2"),
        ("# uri hf", "# url hf"),
        ("# revision 0a1b", "# revision 0a1b\n# revision 0a1b"),
        ("2023-11-14", "2023-02-30"),
        ("2023-11-14T22:13:20Z", "yesterday"),
        ("# file 2", "# file -2"),
        ("# file 2", "# file ٢"),  # a digit to \d and to int()
        ("# file 2", f"# file {'2' * 5000}"),  # ValueError from int()
        ("git-sha1:9e", "sha256:9e"),
        ("git-sha1:9e", "md5:9e"),
        ("git-sha1:9e", "git-sha1:9E"),
        ("# file 0 - b c", "# file 0 - b d"),
        ("44136fa", "44136FA"),
        ("caaff8a  a.json", "caaff8a a.json"),
        ("caaff8a  a.json", "caaff8a  a.json\r"),
        ("a.json", "../a.json"),
        ("a.json", "/a.json"),
        ("a.json", "b c/d"),  # a file and a directory
        ("a.json", "z.json"),  # not sorted: another fingerprint for the same bytes
        ("\n# sealed", "\n\n# sealed"),
        ("hf://acme/tiny", "hf://acme/\x1b[2Jtiny"),
        ("# sealed", f"# archive 3 sha256:{'0' * 63} a.tar\n# sealed"),
        ("# sealed", f"# archive 3 md5:{'0' * 32} a.tar\n# sealed"),
        ("# sealed", f"# archive 3 sha256:{'0' * 64} a.tar\n" * 2 + "# sealed"),
    ],
)
def test_a_text_that_is_not_whole_and_ours_is_refused(old: str, new: str) -> None:
    assert old in TEXT
    with pytest.raises(AgentError) as caught:
        manifest.parse(TEXT.replace(old, new))
    assert caught.value.reason in (Reason.INVALID_SPEC, Reason.UNSAFE_PATH)
    assert len(caught.value.message) < 600


def test_a_mend_needs_the_archive_and_says_which() -> None:
    line = f"# archive 3 sha256:{'0' * 64} a.tar\n# sealed"
    listing = manifest.parse(TEXT.replace("# sealed", line)).listing()
    assert listing.archive == RemoteFile(
        path="a.tar", size=3, origin="", digest=Digest("sha256", "0" * 64)
    )
    assert [file.path for file in listing.files] == ["a.json", "b c"]
    assert pinned.parse(pinned.render(listing)) == listing


def test_a_comment_of_a_later_version_is_passed_over() -> None:
    assert manifest.parse(TEXT.replace("# sealed", "# adopted yes\n# sealed")) == manifest.parse(
        TEXT
    )


@pytest.mark.parametrize("value", ["a\nb", "a\n# include *", "a\rb", "\ud800", "\u202eb"])
@pytest.mark.parametrize("name", ["uri", "revision", "include", "exclude"])
def test_what_is_no_line_is_not_written(name: str, value: str) -> None:
    found = manifest.parse(TEXT)
    if name == "revision":
        bad = replace(found, revision=value)
    else:
        ref = {"uri": value} if name == "uri" else {name: (value,)}
        bad = replace(found, ref=replace(found.ref, **ref))
    with pytest.raises(AgentError) as caught:
        manifest.render(bad)
    assert caught.value.reason is Reason.INVALID_SPEC


def test_a_seal_sorts_by_bytes_whatever_the_order_of_the_source() -> None:
    names = ["b", "a/b", "a.b", "é", "z", "B", "\U0001f600", "\uffee"]
    found = _sealed({name: b"" for name in names})
    assert [file.path.encode() for file in found.files] == sorted(name.encode() for name in names)
    assert manifest.parse(manifest.render(found)) == found


# -- the fingerprint -----------------------------------------------------------------------------


def test_the_same_bytes_have_the_same_fingerprint_wherever_they_came_from() -> None:
    hub = _sealed(CONTENTS)
    bucket = _sealed(CONTENTS, uri="s3://bucket/tiny", revision="etag")
    assert hub.ref.key != bucket.ref.key
    assert hub.fingerprint == bucket.fingerprint
    promised = tuple(replace(file, promised=Digest("sha256", file.sha256)) for file in hub.files)
    assert replace(hub, files=promised, sealed_at=1).fingerprint == hub.fingerprint


def test_the_fingerprint_can_be_computed_with_coreutils() -> None:
    """`grep -v '^#' manifest | sha256sum`."""
    found = _sealed({"a": b"1", "b c": b"2"})
    lines = [line for line in manifest.render(found).split("\n") if not line.startswith("#")]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert found.fingerprint == f"sha256:{digest}"


@pytest.mark.parametrize(
    "other",
    [
        {"a": b"1", "b": b"3"},
        {"a": b"1"},
        {"a": b"1", "b": b"2", "c": b""},
        {"a": b"2", "b": b"1"},
        {"a": b"1", "c": b"2"},
        {"x/a": b"1", "b": b"2"},
    ],
)
def test_other_bytes_or_names_have_another_fingerprint(other: dict[str, bytes]) -> None:
    assert _sealed(other).fingerprint != _sealed({"a": b"1", "b": b"2"}).fingerprint


# -- coreutils -----------------------------------------------------------------------------------


def _sha256sum(root: Path, text: str) -> subprocess.CompletedProcess[str]:
    (root.parent / "manifest").write_text(text)
    return subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "../manifest"],
        cwd=root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    for name, data in CONTENTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_sha256sum_understands_it(model: Path) -> None:
    """`--strict`: not one line may be malformed to it; `--quiet`: and every file is right."""
    layout.check_paths(CONTENTS)
    checked = _sha256sum(model, manifest.render(_sealed(CONTENTS)))
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.parametrize("name", [name for name, data in CONTENTS.items() if data], ids=ascii)
def test_sha256sum_catches_a_flipped_bit_in_any_file(model: Path, name: str) -> None:
    data = bytearray(CONTENTS[name])
    data[-1] ^= 1
    (model / name).write_bytes(data)
    checked = _sha256sum(model, manifest.render(_sealed(CONTENTS)))
    assert checked.returncode == 1
    assert checked.stdout == f"{name}: FAILED\n"


def test_sha256sum_catches_a_missing_file(model: Path) -> None:
    (model / "empty").unlink()
    assert _sha256sum(model, manifest.render(_sealed(CONTENTS))).returncode == 1


# -- what is made of it --------------------------------------------------------------------------


def test_the_entry_of_a_manifest() -> None:
    found = _sealed({"a": b"12", "b": b"345"})
    entry = found.entry(last_used=5.0)
    assert (entry.key, entry.bytes, entry.files) == (found.ref.key, 5, 2)
    assert (entry.sealed_at, entry.last_used) == (1_700_000_000.0, 5.0)
    assert (entry.fingerprint, entry.revision) == (found.fingerprint, "0a1b")


@given(manifests())
def test_a_repair_is_held_to_the_bytes_that_were_sealed(found: Manifest) -> None:
    listing = found.listing()
    room = found.bytes + (found.archive.size if found.archive else 0)
    assert (listing.ref, listing.revision, listing.bytes) == (found.ref, found.revision, room)
    digests = {file.path: str(file.digest).removeprefix("sha256:") for file in listing.files}
    again = manifest.seal(listing, digests, sealed_at=found.sealed_at + 1)
    assert again.fingerprint == found.fingerprint
    assert again.archive == found.archive


# -- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "key"),
    [
        ("hf://meta-llama/meta-llama-3-8b-instruct", "c277d78a31bc6624"),
        ("hf://meta-llama/Meta-Llama-3-8B", "c41ae4f29d692d55"),
        ("hf://Qwen/Qwen2-0.5B-Instruct", "a7631b3fe62115e0"),
        ("gs://kfserving-examples/models/sklearn/1.0/model", "379edc91f9c1bc7b"),
        ("s3://mybucket/mymodel", "89da10faf446bbf1"),
        ("s3://foo", "83fbff445b51876f"),
        ("s3://foo/", "e65e626ad747873c"),
    ],
)
def test_the_key_is_kserves_storage_key(uri: str, key: str) -> None:
    """The vectors of research/kserve.md, Appendix B. Patterns are not part of the key."""
    assert cache_key(uri) == key
    assert ModelRef(uri=uri, include=("*.json",)).key == key
