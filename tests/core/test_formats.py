"""What a file is by its first bytes: every header that is right, and every way to be wrong."""

import io
import json
import pickle
import struct
import zipfile
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.formats import (
    HEAD_BYTES,
    LENGTH_BYTES,
    check_header,
    header_length,
    is_pickle,
    is_pickle_name,
    strictest,
)
from agent.model import FilePolicy


def tensors(header: object, data: bytes = b"", *, pad: int = 0) -> bytes:
    """A safetensors file with this header, whatever it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    return struct.pack("<Q", len(text)) + text + data


def check(data: bytes) -> None:
    """As a file is looked at."""
    length = header_length(data[:LENGTH_BYTES], len(data))
    check_header(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data))


def one(**fields: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}}


_SIZES = {"U8": 1, "BF16": 2, "F32": 4, "I64": 8}


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Right ones, in any order of their tensors."""
    header: dict[str, Any] = {}
    at = 0
    names = draw(st.lists(st.text(max_size=8), unique=True, max_size=6))
    for name in names:
        if name == "__metadata__":
            continue
        dtype = draw(st.sampled_from(sorted(_SIZES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = prod(shape) * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    shuffled = dict(draw(st.permutations(list(header.items()))))
    if draw(st.booleans()):
        shuffled["__metadata__"] = {"format": "pt"}
    return tensors(shuffled, bytes(at), pad=draw(st.integers(0, 9)))


@given(files())
def test_what_is_right_passes(data: bytes) -> None:
    check(data)


@given(files(), st.data())
def test_what_was_cut_off_or_added_to_does_not(data: bytes, more: st.DataObject) -> None:
    cut = data[: more.draw(st.integers(0, len(data) - 1))]
    for wrong in (cut, data + b"x"):
        with pytest.raises(ValueError) as caught:
            check(wrong)
        assert str(caught.value).isprintable()


@given(st.binary(max_size=200))
def test_any_bytes_are_right_or_a_value_error(data: bytes) -> None:
    """And what is wrong with them is fit for a line of a log."""
    for wrong in (data, tensors(data), tensors(b"{" + data)):
        try:
            check(wrong)
        except ValueError as error:
            assert len(str(error)) < 300  # noqa: PT017


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["t", "u", "__metadata__"]), _JSON) | _JSON)
def test_any_json_is_right_or_a_value_error(header: object) -> None:
    try:
        check(tensors(header))
    except ValueError as error:
        assert len(str(error)) < 300  # noqa: PT017


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "0 bytes long"),
        (b"1234567", "7 bytes long"),
        (struct.pack("<Q", 2**63) + b"{}", "its header is said to be"),
        (struct.pack("<Q", 3) + b"{}", "its header is said to be"),
        (b"version https://git-lfs.github.com/spec/v1\n", "its header is said to be"),
        (tensors(b""), "no JSON"),
        (tensors(b"[]"), "no JSON object"),
        (tensors(b" {}"), "no JSON object"),
        (tensors(b'{"a":1,"a":2}'), "names something twice"),
        (tensors(b"[" * 100_000), "no JSON"),
        (tensors(b'{"\xff": 1}'), "no JSON"),
        (tensors(b"{" + b'"a":' + b"9" * 5000 + b"}"), ""),
        (tensors({"__metadata__": {"a": 1}}), "__metadata__"),
        (tensors({"__metadata__": []}), "__metadata__"),
        (tensors({"t": None}, bytes(8)), "described wrongly"),
        (tensors({"t": {}}, bytes(8)), "described wrongly"),
        (tensors(one(dtype=3), bytes(8)), "described wrongly"),
        (tensors(one(shape=[-2]), bytes(8)), "described wrongly"),
        (tensors(one(shape=[True, 2]), bytes(8)), "described wrongly"),
        (tensors(one(shape="ab"), bytes(8)), "described wrongly"),
        (tensors(one(data_offsets=[0]), bytes(8)), "described wrongly"),
        (tensors(one(data_offsets=[8, 0]), bytes(8)), "described wrongly"),
        (tensors(one(data_offsets=[0, 2**64]), bytes(8)), "described wrongly"),
        (tensors(one(shape=[3]), bytes(8)), "not as long as its shape"),
        (tensors(one(data_offsets=[1, 9]), bytes(9)), "begins at 1, not at 0"),  # a hole
        (tensors({**one(), "u": one(data_offsets=[4, 12])["t"]}, bytes(12)), "begins at 4"),
        (tensors(one(), bytes(7)), "its tensors are 8 bytes long, and 7 are there"),
        (tensors({"\x1b[2J": None}), "\\x1b[2J"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, why: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(data)
    assert why in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_type_that_is_younger_than_this_is_believed() -> None:
    check(tensors(one(dtype="F4_X2"), bytes(8)))


def _torch() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(4))
    return made.getvalue()


def _zip() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a.txt", b"")
    return made.getvalue()


@pytest.mark.parametrize(
    ("path", "data", "found"),
    [
        *((f"a/m.{end}", b"any", True) for end in ("bin", "pt", "PTH", "pkl", "pickle", "ckpt")),
        *(("m.dat", pickle.dumps([1], protocol), True) for protocol in (2, 3, 4, 5)),
        ("m.dat", _torch(), True),
        ("m.dat", pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"storages", True),
        ("m.dat", _zip(), False),
        ("m.dat", b"PK\x03\x04", False),
        ("m.dat", b"\x80\x02 and no end", False),
        ("m.dat", b"", False),
        ("config.json", b"{}", False),
        ("m.gguf", b"GGUF....", False),
        ("bin", b"x", False),
        # The length of its header, 0x280, and a tensor that ends in a full stop.
        ("m.safetensors", b"\x80\x02" + bytes(6) + b"{}.", False),
    ],
)
def test_what_runs_code_when_it_is_loaded(path: str, data: bytes, found: bool) -> None:
    assert is_pickle(path, data[:HEAD_BYTES], data[-1:]) is found


def test_of_two_policies_the_strictest_holds() -> None:
    off, warn, refuse = FilePolicy.OFF, FilePolicy.WARN, FilePolicy.REFUSE
    assert strictest([]) is None
    assert strictest([None, None]) is None
    assert strictest([None, off]) is off
    assert strictest([off, refuse, warn]) is refuse
    assert strictest([warn, off]) is warn


def test_a_shape_of_many_numbers_is_not_multiplied() -> None:
    """It would take minutes, and nothing else of the agent would run meanwhile."""
    shape = [2**62] * 33
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    with pytest.raises(ValueError, match="described wrongly"):
        check_header(header, 8 + len(header) + 4)


@pytest.mark.parametrize(
    "path", ["model.joblib", "m.pkl.gz", "m.JOBLIB.z", "m.pickle.lz4", "x.dill", "a/b.bin.xz"]
)
def test_what_joblib_writes_is_a_pickle_by_its_name(path: str) -> None:
    assert is_pickle_name(path)
    assert not is_pickle_name(path + ".txt")


def test_a_framed_pickle_is_one_whatever_follows_it() -> None:
    framed = pickle.dumps([1, 2], protocol=4)
    assert is_pickle("m.bst", framed, b"\0")
    assert not is_pickle("m.safetensors", framed, b"\0")
