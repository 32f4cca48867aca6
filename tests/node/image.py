"""The agent's image, built from the Dockerfile that we ship, without a container daemon.

    python -m tests.node.image agent.tar    # as `docker save` would write it

buildah and the base image are the host's Debian packages: the base is Python with its venv module,
a shell and the certificate authorities, 85 MB. Where the host has a pip configuration, the build
step sees it read-only, so that pip asks the same index as everywhere else; it is not in the image.

Cold this takes about a minute; a second with nothing changed; a few with only `agent/` changed.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path

from tests.machine import REPOSITORY
from tests.node.archive import pack
from tests.node.packages import (
    CACHE,
    locked,
    made_once,
    make_mount_points,
    remove_mount_points,
    run,
    unpacked_with_dependencies,
)

NAME = "localhost/localmodel-agent:dev"
_BASE = "localhost/localmodel-agent-base:dev"

_BASE_PACKAGES = ("dash", "coreutils", "python3-venv", "ca-certificates")
_CERTIFICATES = Path("etc/ssl/certs/ca-certificates.crt")
_SELDOM_CHANGED = ("Dockerfile", ".dockerignore", "pyproject.toml", "requirements.lock")


def agent_image() -> Path:
    """The archive for this very state of the sources; built if it was not already."""
    with locked("image"):
        archive = made_once(CACHE / "images" / f"{_fingerprint(agent=True)}.tar", _build)
        archive.touch()
        _keep_newest(archive.parent, 2)
        return archive


def _keep_newest(directory: Path, count: int) -> None:
    newest_first = sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in newest_first[count:]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def _fingerprint(*, agent: bool) -> str:
    """Of everything that can change the image; without `agent`, of what its large layer is from."""
    digest = hashlib.sha256(" ".join(_BASE_PACKAGES).encode())
    sources = [REPOSITORY / name for name in _SELDOM_CHANGED]
    if agent:
        sources += [REPOSITORY / "README.md", REPOSITORY / "LICENSE"]  # in the package's metadata
        sources += sorted((REPOSITORY / "agent").rglob("*.py"))
    for path in sources:
        digest.update(f"\n{path.relative_to(REPOSITORY)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(archive: Path) -> None:
    # One storage for each set of dependencies: in it the layers of earlier builds are found again.
    buildah = _Buildah(CACHE / "buildah" / _fingerprint(agent=False))
    _keep_newest(CACHE / "buildah", 1)
    buildah("pull", "--quiet", f"docker-archive:{made_once(CACHE / 'base.tar', _make_base)}")
    buildah("build", "--quiet", "--layers", "--pull-never", "--build-arg", f"BASE={_BASE}",
            *_host_files(), "--tag", NAME, REPOSITORY)  # fmt: skip
    buildah("push", "--quiet", NAME, f"docker-archive:{archive}:{NAME}")


def _make_base(archive: Path) -> None:
    tree = unpacked_with_dependencies(*_BASE_PACKAGES, on_host=False)
    # A script of the package would make this bundle, and no script of a package ran.
    bundle = tree / _CERTIFICATES
    if not bundle.exists():
        authorities = sorted((tree / "usr/share/ca-certificates").rglob("*.crt"))
        bundle.write_bytes(b"".join(path.read_bytes() for path in authorities))
    for name in ("tmp", "proc", "sys", "dev", "run", "root"):
        (tree / name).mkdir(exist_ok=True)
    (tree / "tmp").chmod(0o1777)
    # Where the host's is mounted; else the builder would leave an empty file in our own layers.
    (tree / "etc/pip.conf").touch()
    pack(archive, _BASE, tree, command=["python3"])


def _host_files() -> list[str]:
    """How this host reaches its package index, for the build steps and not for the image."""
    configurations = (
        Path(os.environ.get("PIP_CONFIG_FILE") or "/dev/null"),
        Path.home() / ".config/pip/pip.conf",
        Path("/etc/pip.conf"),
    )
    flags = []
    if found := next((path for path in configurations if path.is_file()), None):
        flags.append(f"--volume={found}:/etc/pip.conf:ro")
    if (Path("/") / _CERTIFICATES).is_file():
        flags.append(f"--volume=/{_CERTIFICATES}:/{_CERTIFICATES}:ro")
    return flags


_BLOB_CACHE = "/var/lib/containers"
"""Compiled into buildah, which would leave a cache there."""

_PRIVATELY = """
mount --bind "$1" /etc/ld.so.cache
mount -t tmpfs tmpfs "$2"
shift 2
exec "$@"
"""


class _Buildah:
    """buildah from its package, with storage of its own and none of the host's configuration."""

    def __init__(self, home: Path) -> None:
        self._home = home
        tree = unpacked_with_dependencies("buildah", on_host=True)
        program = tree / "usr/bin/buildah"  # absent where the host has it installed
        self._program = program if program.exists() else Path(shutil.which("buildah") or program)
        for name in ("tmp", "cni"):
            (home / name).mkdir(parents=True, exist_ok=True)
        (home / "containers.conf").write_text(f'[network]\nnetwork_config_dir = "{home / "cni"}"\n')
        (home / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        (home / "registries.conf").write_text("")
        # Its libraries are beside it. LD_LIBRARY_PATH would not do: it starts itself again, inside
        # the build, with the environment of the image. So it sees a linker cache that names them.
        libraries = [str(path) for path in (tree / "usr/lib").glob("*-linux-*")]
        (home / "ld.so.conf").write_text(
            "\n".join(["include /etc/ld.so.conf.d/*.conf", *libraries])
        )
        run("ldconfig", "-C", home / "ld.so.cache", "-f", home / "ld.so.conf")

    def __call__(self, verb: str, *arguments: str | Path) -> str:
        home = self._home
        # In a mount namespace of its own: what a killed build had mounted is gone with it.
        make_mount_points(_BLOB_CACHE)
        try:
            return run(
                "unshare", "--mount", "sh", "-ec", _PRIVATELY,
                "sh", home / "ld.so.cache", _BLOB_CACHE,
                self._program, "--storage-driver=overlay", f"--root={home / 'storage'}",
                f"--runroot={home / 'run'}", f"--registries-conf={home / 'registries.conf'}",
                verb, "--signature-policy", home / "policy.json", *arguments,
                env={
                    **os.environ,
                    "BUILDAH_ISOLATION": "chroot",
                    "CONTAINERS_CONF": str(home / "containers.conf"),
                    "HOME": str(home),
                    "TMPDIR": str(home / "tmp"),
                },
            )  # fmt: skip
        finally:
            remove_mount_points(_BLOB_CACHE)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    shutil.copyfile(agent_image(), sys.argv[1])


if __name__ == "__main__":
    main()
