"""Pickles and broken safetensors: said, refused, or nobody's business, as the operator decided."""

import pickle
from pathlib import Path

import pytest

from agent import manifest
from agent.errors import Reason
from agent.model import FilePolicy, cache_key
from agent.phases import Phase
from agent.status import camel_case, model_status
from tests.core.test_formats import one, tensors
from tests.machine import Machine, files_of
from tests.scenarios.test_archives import tarball
from tests.scenarios.volume import Volume

URI = "fake://model"
KEY = cache_key(URI)
GOOD = {"config.json": b"{}", "model.safetensors": tensors(one(), bytes(8))}
PICKLED = {**GOOD, "pytorch_model.bin": b"named so"}
HIDDEN = {**GOOD, "weights.dat": pickle.dumps([1, 2])}
BROKEN = {**GOOD, "half.safetensors": tensors(one(), bytes(3))}


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path)


def _counted(volume: Volume) -> dict[tuple[str, str], float]:
    """By kind and policy, where there was anything to count."""
    return {
        (sample.labels["kind"], sample.labels["policy"]): sample.value
        for metric in volume.metrics.unsafe_models.collect()
        for sample in metric.samples
        if sample.value
    }


@pytest.mark.parametrize(
    ("files", "kind", "said"),
    [
        (PICKLED, "pickle", "pytorch_model.bin runs code when it is loaded"),
        (HIDDEN, "pickle", "weights.dat runs code when it is loaded"),
        ({**HIDDEN, **PICKLED}, "pickle", "pytorch_model.bin and 1 more run code"),
        (BROKEN, "safetensors", "half.safetensors: its tensors are 8 bytes long, and 3 are there"),
    ],
)
async def test_a_warning_goes_with_the_model(
    volume: Volume, files: dict[str, bytes], kind: str, said: str
) -> None:
    volume.source.add(URI, files)
    async with volume.turning():
        volume.want(URI)
        await volume.reach(URI, Phase.READY)
        status = model_status(volume.reconciler.facts()[KEY], path="/there")
        assert status is not None
        assert status.message.startswith(said)
        assert status.reason == "", "nothing has failed"
        assert camel_case(status)["warning"] == status.message
        assert files_of(volume.store.model(KEY)) == files, "byte for byte"
        assert _counted(volume) == {(kind, "warn"): 1}
    # A later life says so, too.
    (found,) = [entry for entry in volume.store.entries() if entry.key == KEY]
    assert found.warning.startswith(said)


async def test_nothing_is_said_of_a_good_one(volume: Volume) -> None:
    volume.source.add(URI, GOOD)
    async with volume.turning():
        volume.want(URI, file_policy=FilePolicy.REFUSE)
        await volume.reach(URI, Phase.READY)
        sealed = volume.store.manifest(KEY)
        assert sealed is not None
        assert sealed.warnings == ()
        assert "warning" not in manifest.render(sealed)
        assert _counted(volume) == {}


async def test_off_is_off(volume: Volume) -> None:
    volume.source.add(URI, {**PICKLED, **BROKEN})
    async with volume.turning():
        volume.want(URI, file_policy=FilePolicy.OFF)
        await volume.reach(URI, Phase.READY)
        sealed = volume.store.manifest(KEY)
        assert sealed is not None
        assert sealed.warnings == ()


@pytest.mark.parametrize(
    ("files", "asked"), [(PICKLED, 0), (HIDDEN, 3), (BROKEN, 3)], ids=["name", "bytes", "header"]
)
async def test_what_is_refused_is_never_on_offer(
    volume: Volume, files: dict[str, bytes], asked: int
) -> None:
    """By its name before the first byte; and never again by itself."""
    volume.source.add(URI, files)
    async with volume.turning():
        volume.want(URI, file_policy=FilePolicy.REFUSE)
        await volume.reach(URI, Phase.FAILED)
        failure = volume.reconciler.failure(KEY)
        assert failure is not None
        assert failure.reason is Reason.UNSAFE_FILES
        assert "the file policy refuses it" in failure.message
        calls = [operation for operation, _ in volume.source.calls]
        assert calls.count("locate") == asked
        await volume.later(100_000)
        assert len(volume.source.calls) == len(calls)
        assert volume.store.manifest(KEY) is None
        # Who changes their mind is heard at once, and what came already is kept.
        volume.want(URI, file_policy=FilePolicy.WARN)
        await volume.reach(URI, Phase.READY)
        assert [operation for operation, _ in volume.source.calls].count("locate") == 3


async def test_what_a_wish_refused_is_not_held_against_the_next(volume: Volume) -> None:
    """Which came while the job for the other was running."""
    volume.source.add(URI, HIDDEN)
    async with volume.turning():
        with volume.source.held("locate"):
            volume.want(URI, file_policy=FilePolicy.REFUSE)
            await volume.reach(URI, Phase.FETCHING)
            volume.want(URI, file_policy=FilePolicy.WARN)
            await volume.turn()
        await volume.reach(URI, Phase.READY)
        assert volume.reconciler.failure(KEY) is None


async def test_what_an_archive_holds_is_refused_before_it_is_unpacked(volume: Volume) -> None:
    volume.source.add(URI, {"model.tar": tarball(PICKLED, mode="w")})
    async with volume.turning():
        volume.want(URI, file_policy=FilePolicy.REFUSE)
        await volume.reach(URI, Phase.FAILED)
        failure = volume.reconciler.failure(KEY)
        assert failure is not None
        assert failure.reason is Reason.UNSAFE_FILES
        assert not any(path.is_file() for path in volume.store.tree(KEY).rglob("*"))


def test_the_command(localmodel: Machine, tmp_path: Path) -> None:
    root = tmp_path / "model"
    root.mkdir()
    for name, data in HIDDEN.items():
        (root / name).write_bytes(data)
    refused = localmodel("pull", str(root), "--file-policy", "refuse")
    assert refused.code == 1
    assert "UnsafeFiles" in refused.stderr
    assert "weights.dat" in refused.stderr
    refused = localmodel("pull", str(root), environment={"LOCALMODEL_FILE_POLICY": "never"})
    assert refused.code == 2
    assert "LOCALMODEL_FILE_POLICY" in refused.stderr
    done = localmodel("pull", str(root)).ok()
    assert "warning: weights.dat runs code" in done.stderr
    assert localmodel("pull", str(root), "-o", "json").ok().json["warning"].startswith("weights")


async def test_what_was_refused_is_not_published_by_the_next_life(tmp_path: Path) -> None:
    """Every byte of it is there: the next start must not take it for a seal that was cut off."""
    first = Volume(tmp_path)
    first.source.add(URI, HIDDEN)
    async with first.turning():
        first.want(URI, file_policy=FilePolicy.REFUSE)
        await first.reach(URI, Phase.FAILED)
    second = Volume(tmp_path)
    async with second.turning():
        await second.turn(5)
        assert second.store.manifest(KEY) is None
        assert second.phase(URI) is not Phase.READY
