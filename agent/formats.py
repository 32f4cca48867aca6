"""Which files run code when they are loaded, and which safetensors files cannot be loaded. Pure.

Every byte may be proven and the model still be a pickle, which runs what its author likes in the
server that loads it, or a half-written upload. What is done about it is the operator's to say.
"""

import json
import struct
from collections.abc import Iterable
from math import prod
from typing import Any

from agent.layout import is_one_line
from agent.model import FilePolicy

HEAD_BYTES = 512
"""What `is_pickle` wants to see of the start of a file."""
LENGTH_BYTES = 8
MOST_HEADER_BYTES = 8 * 1024**2
"""The format allows 100 MB. As Python objects that would be ten times as much, and more than the
agent may have; what we have seen was 4 MB for 40,000 tensors. A longer one is not read."""

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
_PACKED = (".gz", ".z", ".bz2", ".xz", ".lzma", ".lz4")  # as joblib writes and reads them
_MOST_DIMENSIONS = 32
"""A product of many large numbers takes minutes, and nothing else runs meanwhile."""
_TORCH = bytes.fromhex("80028a0a6cfc9c46f920")  # how torch.save began a file before it wrote zips
_ZIP, _NAME_AT = b"PK\x03\x04", 30
_STRICTEST = (FilePolicy.OFF, FilePolicy.WARN, FilePolicy.REFUSE)
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


def strictest(policies: Iterable[FilePolicy | None]) -> FilePolicy | None:
    """Of those that say something; None where nobody does."""
    return max((p for p in policies if p is not None), key=_STRICTEST.index, default=None)


def is_pickle_name(path: str) -> bool:
    name = path.lower()
    packed = next((end for end in _PACKED if name.endswith(end)), "")
    return name.removesuffix(packed).endswith(_PICKLES)


def is_pickle(path: str, head: bytes, last: bytes) -> bool:
    """By its name, or by what it begins and ends with. `last` is its last byte.

    A pickle of an old protocol begins with anything; under the name of another kind of file, no
    loader would take it for one.
    """
    if is_pickle_name(path) or head.startswith(_TORCH):
        return True
    if head.startswith(_ZIP) and len(head) >= _NAME_AT:
        (length,) = struct.unpack_from("<H", head, _NAME_AT - 4)
        return head[_NAME_AT : _NAME_AT + length].endswith(b"data.pkl")
    if head[:3] in (b"\x80\x04\x95", b"\x80\x05\x95"):  # PROTO and FRAME: by chance in 2**23
        return not is_safetensors(path)
    # PROTO and STOP. A safetensors file may begin so too: with the length of its header.
    proto = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return proto and last == b"." and not is_safetensors(path)


def is_safetensors(path: str) -> bool:
    return path.lower().endswith(".safetensors")


def header_length(first: bytes, size: int) -> int:
    """The bytes of a safetensors header, from the first ones of a file of `size` bytes.

    Raises ValueError with what is wrong.
    """
    if len(first) < LENGTH_BYTES:
        raise ValueError(f"it is {size} bytes long")
    (length,) = struct.unpack("<Q", first[:LENGTH_BYTES])
    if length > size - LENGTH_BYTES:
        raise ValueError(f"its header is said to be {length} bytes long, and the file is {size}")
    return int(length)


def check_header(header: bytes, size: int) -> None:
    """The header of a safetensors file of `size` bytes. Raises ValueError with what is wrong."""
    try:
        found = json.loads(header.decode(), object_pairs_hook=_once)
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError("its header is no JSON") from None
    if not header.startswith(b"{") or not isinstance(found, dict):
        raise ValueError("its header is no JSON object")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ is not an object of texts")
    end = 0
    for begin, until, name in sorted(_span(name, tensor) for name, tensor in found.items()):
        if begin != end:
            raise ValueError(f"the tensor {_shown(name)} begins at {begin}, not at {end}")
        end = until
    there = size - LENGTH_BYTES - len(header)
    if end != there:
        raise ValueError(f"its tensors are {end} bytes long, and {there} are there")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names something twice")
    return found


def _span(name: str, tensor: Any) -> tuple[int, int, str]:
    """Where a tensor begins and ends."""
    try:
        dtype, shape, (begin, end) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        whole = isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS
        whole = whole and all(map(_is_size, (begin, end, *shape)))
    except (TypeError, ValueError, KeyError):
        whole = False
    if not whole or not isinstance(dtype, str) or begin > end:
        raise ValueError(f"the tensor {_shown(name)} is described wrongly")
    bits = _BITS.get(dtype)  # of a type that is younger than this, nothing is known
    if bits is not None and prod(shape) * bits != 8 * (end - begin):
        raise ValueError(f"the tensor {_shown(name)} is not as long as its shape says")
    return begin, end, name


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _shown(text: str) -> str:
    return repr(text[:80]) if is_one_line(text[:80]) else ascii(text[:80])


def sentence(names: list[str], what: str) -> str:
    """`a.bin and 2 more` + what they do. For a line of a manifest, a status, an Event."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0][:200]}{more} {what}"
