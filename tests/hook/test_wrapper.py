"""The wrapper, in every shell that an initializer's image may have, as any user."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from agent import layout
from agent.hook import wrapper
from agent.hook.wrapper import Pair, command
from agent.model import cache_key
from tests.machine import until
from tests.node.packages import need_host, unpacked

SHELLS = ("dash", "bash", "busybox")
URI = "hf://acme/tiny"
FILES = {
    "config.json": b"{}",
    "sub/weights.bin": b"w" * 1000,
    ".hidden": b"h",
    "..odd": b"o",
    "with space & 'quote' $(x) *": b"q",
    "empty": b"",
}


def _pair(uri: str = URI, cached: str = "", rest: str = "") -> Pair:
    cached = cached or uri
    return Pair(uri=uri, key=cache_key(cached), cached=cached, rest=rest)


def _shell(name: str, home: Path) -> list[str]:
    if name != "busybox":
        return [name]
    need_host()
    # A copy: not every user may look into our cache directory.
    packed = unpacked("busybox-static") / "bin" / "busybox"
    return [str(shutil.copy(packed, home / "busybox")), "sh"]


class Pod:
    """A mounted cache, a destination, and an original entrypoint that notes what it was given."""

    def __init__(self, home: Path, shell: str) -> None:
        self.home = home
        self.shell = _shell(shell, home)
        self.root = home / "the cache"
        self.destination = home / "mnt" / "models"
        self.original = home / "original entrypoint"
        self.given = home / "given"
        for name in (layout.MODELS, layout.MANIFESTS, layout.PROGRESS):
            (self.root / name).mkdir(parents=True)
        self.destination.mkdir(parents=True)
        self.original.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > '{self.given}'\n")
        self.original.chmod(0o755)

    def seal(self, uri: str, files: Mapping[str, bytes]) -> None:
        key = cache_key(uri)
        for path, data in files.items():
            place = self.root / layout.model(key) / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        text = f"# localmodel manifest 1\n# uri {uri}\n# revision r\n{'0' * 64}  config.json\n"
        (self.root / layout.manifest(key)).write_text(text)

    def progress(self, uri: str, line: str) -> None:
        path = self.root / layout.progress(cache_key(uri))
        aside = path.with_suffix(".new")
        aside.write_text(line + "\n")
        aside.replace(path)

    def start(
        self,
        *pairs: Pair,
        arguments: tuple[str, ...] = (),
        limit: int = 20,
        user: int | None = None,
        inside: tuple[str, ...] = (),
    ) -> subprocess.Popen[str]:
        sh, *rest = command(
            pairs, root=str(self.root), limit_seconds=limit, entrypoint=[str(self.original)]
        )
        assert sh == "sh"
        return subprocess.Popen(
            [*inside, *self.shell, *rest, *(arguments or (URI, str(self.destination)))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            user=user,
            cwd="/",
            env={"PATH": os.environ["PATH"]},
        )

    def run(self, *pairs: Pair, **options: object) -> str:
        process = self.start(*pairs, **options)  # type: ignore[arg-type]
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
        return said

    @property
    def asked(self) -> list[str] | None:
        """What the original was asked for; None if it did not run."""
        return self.given.read_text().splitlines() if self.given.exists() else None

    def seen(self, destination: Path | None = None) -> dict[str, bytes]:
        """What a server reads, through the links."""
        root = destination or self.destination
        return {
            str(Path(directory, name).relative_to(root)): Path(directory, name).read_bytes()
            for directory, _, names in os.walk(root, followlinks=True)
            for name in names
        }


@pytest.fixture(params=SHELLS)
def pod(request: pytest.FixtureRequest, tmp_path: Path) -> Pod:
    return Pod(tmp_path, request.param)


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "SILENT_SECONDS", 2)
    monkeypatch.setattr(wrapper, "STILL_SECONDS", 2)


def test_shellcheck_has_nothing_to_say() -> None:
    """Of a page with a quoted URI in it."""
    _, _, script, _ = command(
        [_pair("s3://bucket/it's"), _pair()],
        root="/mnt/localmodel",
        limit_seconds=1800,
        entrypoint=["/storage-initializer/scripts/initializer-entrypoint"],
    )
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run(
        [shellcheck, "--shell=sh", "--enable=all", "--exclude=SC2250,SC2292,SC2310,SC2312", "-"],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


def test_what_is_on_offer_is_linked_and_nothing_else_runs(pod: Pod) -> None:
    pod.seal(URI, FILES)
    said = pod.run(_pair())
    assert pod.seen() == FILES
    assert pod.asked is None
    assert f"{URI} is at {pod.destination}" in said
    assert all(path.is_symlink() for path in pod.destination.iterdir())


def test_run_again_it_does_the_same(pod: Pod) -> None:
    pod.seal(URI, FILES)
    pod.run(_pair())
    pod.run(_pair())
    assert pod.seen() == FILES
    assert pod.asked is None


def test_over_what_the_original_left_the_original_runs(pod: Pod) -> None:
    pod.seal(URI, FILES)
    (pod.destination / "half").write_bytes(b"of it")
    pod.run(_pair())
    assert pod.asked == [URI, str(pod.destination)]
    assert pod.seen() == {"half": b"of it"}


def test_over_a_link_to_elsewhere_the_original_runs(pod: Pod) -> None:
    pod.seal(URI, FILES)
    (pod.destination / "config.json").symlink_to("/etc/passwd")
    pod.run(_pair())
    assert pod.asked == [URI, str(pod.destination)]


def test_what_left_the_cache_leaves_no_link(pod: Pod, hurry: None) -> None:
    """A node that was rebooted runs a pod's initializers again, over what they left."""
    pod.seal(URI, FILES)
    pod.run(_pair())
    shutil.rmtree(pod.root / layout.MODELS)
    (pod.destination / "mine").write_bytes(b"kept")
    pod.run(_pair())
    assert pod.asked == [URI, str(pod.destination)]
    left = [path.name for path in pod.destination.iterdir()]
    assert left == ["mine"], "the original cannot write through a dead link"


def test_another_revision_takes_the_place_of_all_links(pod: Pod) -> None:
    pod.seal(URI, FILES)
    pod.run(_pair())
    shutil.rmtree(pod.root / layout.model(cache_key(URI)))
    pod.seal(URI, {"config.json": b"{2}", "new": b"n"})
    pod.run(_pair())
    assert pod.seen() == {"config.json": b"{2}", "new": b"n"}
    assert len(list(pod.destination.iterdir())) == 2, "a link leads nowhere"
    assert pod.asked is None


def test_what_cannot_be_linked_whole_is_not_linked_at_all(pod: Pod) -> None:
    """The original must find it as it was. Here one name leads to a path that is too long."""
    pod.seal(URI, {"a": b"1", "b" * 200: b"2"})
    deep = f"{pod.destination}/" + "/".join(["d" * 199] * 20)
    place = Path(deep[:3950])
    pod.run(_pair(), arguments=(URI, str(place)))
    assert pod.asked == [URI, str(place)]
    assert not list(place.iterdir())


@pytest.mark.parametrize("archive", ["m.tar.gz", "m.ZIP", "m.tgz", "m.tar", "m.tar.xz", "m.tbz2"])
def test_an_archive_in_a_cached_prefix_is_for_the_original_to_unpack(
    pod: Pod, archive: str
) -> None:
    """Named by itself, or alone in its directory, KServe's initializer unpacks it."""
    cached = "s3://bucket/models"
    pod.seal(cached, {f"a/{archive}": b"packed", f"b/{archive}": b"packed", "b/other": b"o"})
    for rest in (f"a/{archive}", "a"):
        uri = f"{cached}/{rest}"
        pod.run(_pair(uri, cached, rest), arguments=(uri, str(pod.destination)))
        assert pod.asked == [uri, str(pod.destination)]
        assert not list(pod.destination.iterdir())
        pod.given.unlink()
    uri = f"{cached}/b"
    pod.run(_pair(uri, cached, "b"), arguments=(uri, str(pod.destination)))
    assert pod.seen() == {archive: b"packed", "other": b"o"}
    assert pod.asked is None


def test_a_manifest_of_another_model_is_not_believed(pod: Pod, hurry: None) -> None:
    pod.seal(URI, FILES)
    manifest = pod.root / layout.manifest(cache_key(URI))
    manifest.write_text(manifest.read_text().replace(URI, URI + "-other"))
    pod.run(_pair())
    assert pod.asked == [URI, str(pod.destination)]


def test_a_uri_in_the_body_of_a_manifest_is_no_name(pod: Pod, hurry: None) -> None:
    """A file may be called anything."""
    pod.seal(URI, FILES)
    (pod.root / layout.manifest(cache_key(URI))).write_text(f"# x\n00  y\n# uri {URI}\n")
    pod.run(_pair())
    assert pod.asked == [URI, str(pod.destination)]


def test_a_part_of_a_model_and_one_file(pod: Pod) -> None:
    cached = "s3://bucket/models"
    pod.seal(cached, {"a/x": b"1", "a/b/y": b"2", "other": b"3"})
    uri = "s3://bucket/models/a/"
    pod.run(_pair(uri, cached, "a"), arguments=(uri, str(pod.destination)))
    assert pod.seen() == {"x": b"1", "b/y": b"2"}
    one, place = "s3://bucket/models/a/x", pod.home / "one"
    pod.run(_pair(one, cached, "a/x"), arguments=(one, str(place)))
    assert pod.seen(place) == {"x": b"1"}
    missing = "s3://bucket/models/gone"
    pod.run(_pair(missing, cached, "gone"), arguments=(missing, str(pod.home / "new")))
    assert pod.asked == [missing, str(pod.home / "new")]


def test_of_two_pairs_the_one_that_is_missing_is_left_to_the_original(pod: Pod) -> None:
    pod.seal(URI, FILES)
    other, place = "gs://elsewhere/adapter", str(pod.home / "mnt" / "adapter")
    for arguments in (
        (other, place, URI, str(pod.destination)),
        (URI, str(pod.destination), other, place),
    ):
        pod.run(_pair(), arguments=arguments)
        assert pod.asked == [other, place]
        assert pod.seen() == FILES
        pod.given.unlink()


def test_it_waits_while_the_model_comes(pod: Pod) -> None:
    pod.progress(URI, "wait 1 10 100 downloading")
    process = pod.start(_pair())
    time.sleep(1.5)
    assert process.poll() is None
    pod.progress(URI, "wait 2 60 100 downloading")
    time.sleep(1.5)
    pod.seal(URI, FILES)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 0, said
    assert "10 of 100 bytes" in said
    assert "60 of 100 bytes" in said
    assert pod.seen() == FILES
    assert pod.asked is None


@pytest.mark.parametrize(
    ("prepare", "limit", "why"),
    [
        (lambda pod: None, 20, "no agent answers"),
        (lambda pod: pod.progress(URI, "wait 7 1 2 x"), 20, "agent of this node is silent"),
        (lambda pod: pod.progress(URI, "fallback 7 1 2 InsufficientCapacity"), 20, "Insufficient"),
        (lambda pod: pod.progress(URI, "wait 7 1 2 x"), 0, "waited long enough"),
        (lambda pod: pod.progress(URI, ""), 20, "agent of this node is silent"),
        (lambda pod: shutil.rmtree(pod.root), 20, "no agent answers"),
    ],
    ids=["no agent", "dead agent", "refused", "late", "garbage", "nothing mounted"],
)
def test_when_there_is_nothing_to_wait_for_the_original_runs(
    pod: Pod, hurry: None, prepare: Callable[[Pod], None], limit: int, why: str
) -> None:
    prepare(pod)
    said = pod.run(_pair(), limit=limit)
    assert why in said
    assert pod.asked == [URI, str(pod.destination)]


def test_any_user_may_run_it(pod: Pod) -> None:
    """As OpenShift gives them: no name, no home, no group that owns anything."""
    pod.seal(URI, FILES)
    for path in (pod.home, *pod.home.parents):
        if path.stat().st_mode & 0o005 != 0o005 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    pod.destination.chmod(0o777)
    pod.run(_pair(), user=1_000_650_000)
    assert pod.seen() == FILES
    assert pod.asked is None


HOSTILE = [
    "hf://a/b'; touch /tmp/pwned; '",
    "s3://bucket/$(touch pwned)`x`",
    's3://bucket/"quoted" \\ *?[x]',
    "s3://bucket/@ROOT@ @KNOWN@",
    "-n",
    "s3://bucket/*",
]


@pytest.mark.parametrize("uri", HOSTILE)
def test_a_uri_is_data_whatever_it_is(pod: Pod, uri: str) -> None:
    pod.seal(uri, {"config.json": b"{}"})
    pod.run(_pair(uri), arguments=(uri, str(pod.destination)))
    assert pod.seen() == {"config.json": b"{}"}
    assert pod.asked is None
    other = uri + "x"
    pod.run(_pair(uri), arguments=(other, str(pod.home / "other")))
    assert pod.asked == [other, str(pod.home / "other")]
    assert not Path("/tmp/pwned").exists()


def test_without_arguments_the_original_says_what_is_wrong(pod: Pod) -> None:
    """One argument is no pair; it is not ours to judge."""
    pod.run(_pair(), arguments=("alone",))
    assert pod.asked == ["alone"]


def test_it_ends_when_it_is_told_to(pod: Pod) -> None:
    process = pod.start(_pair())
    time.sleep(0.5)
    process.terminate()
    until(lambda: process.poll() is not None, seconds=5)
    assert pod.asked is None
    if process.stdout is not None:
        process.stdout.close()


def test_it_ends_when_it_is_told_to_as_the_first_process_too(pod: Pod) -> None:
    """Whom the kernel protects from signals that it did not ask for: a deleted pod would stay for
    its grace period."""
    need_host()
    process = pod.start(_pair(), inside=("unshare", "--pid", "--fork", "--kill-child"))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: bool(children.read_text()), seconds=5)
    (first,) = children.read_text().split()
    time.sleep(0.5)
    os.kill(int(first), signal.SIGTERM)
    try:
        until(lambda: process.poll() is not None, seconds=5)
    finally:
        process.kill()
        process.communicate()
    assert pod.asked is None


def test_an_entrypoint_is_words_whatever_they_are() -> None:
    _, _, script, _ = command(
        [_pair()], root="/c", limit_seconds=1, entrypoint=["/x", "@KNOWN@", "@LIMIT@"]
    )
    assert "exec /x @KNOWN@ @LIMIT@ " in script
