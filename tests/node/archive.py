"""Container images without a builder: a directory becomes a one-layer `docker save` archive."""

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Sequence
from pathlib import Path

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_LONG_AGO = "1970-01-01T00:00:00Z"


def pack(
    archive: Path,
    name: str,
    tree: Path,
    *,
    command: Sequence[str] = (),
    entrypoint: Sequence[str] = (),
) -> None:
    """Write `archive`; the same tree gives the same bytes, whenever and wherever it is packed."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as packed:
        for path in sorted(tree.rglob("*")):
            packed.add(path, str(path.relative_to(tree)), recursive=False, filter=_anonymous)
    layer_id = hashlib.sha256(layer.getbuffer()).hexdigest()
    machine = platform.machine()
    config = {
        "architecture": _ARCHITECTURES.get(machine, machine),
        "os": "linux",
        "created": _LONG_AGO,
        "config": {
            "Entrypoint": list(entrypoint),
            "Cmd": list(command),
            "Env": ["PATH=/usr/local/bin:/usr/bin:/bin"],
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_id}"]},
        "history": [{"created": _LONG_AGO, "created_by": "tests/node/archive.py"}],
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(archive, "w") as out:
        for member, content in (
            ("layer.tar", layer.getvalue()),
            ("config.json", json.dumps(config).encode()),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
