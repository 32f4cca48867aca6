"""What kubelet does with local volumes, sub-paths and read-only claims. The design stands on it.

The admission hook mounts the claim read-only at the *claim* (`volumes[].persistentVolumeClaim`),
the agent publishes a model by one rename, `prepare` makes the volume's directory early: each for
one of these facts. If one changes with a new Kubernetes, the design has to.
"""

import re
from pathlib import Path
from stat import filemode

import pytest

from tests.machine import until
from tests.node.objects import PATIENCE, SLEEP, Lab, claim, container, volume

MODEL = "models/0123456789abcdef"
KEY = Path(MODEL).name


def publish(lab: Lab, content: str = "weights", at: str = MODEL) -> None:
    """As the agent does: a directory is complete elsewhere and renamed to where it belongs."""
    aside = lab.path / "aside"
    aside.mkdir(parents=True)
    (aside / "model.bin").write_text(content)
    target = lab.path / at
    target.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(target)


def server(**mounts: str) -> dict[str, object]:
    """A container that mounts sub-paths of the claim: `server(models=MODEL)` at `/models`."""
    return container("server", SLEEP, {f"/{at}": sub for at, sub in mounts.items()})


def test_absent_subpath_of_a_writable_claim_is_made_and_the_server_starts_on_nothing(
    lab: Lab,
) -> None:
    """The trap. What is renamed to that place later, only the server's successor sees."""
    lab.path.mkdir(parents=True)
    lab.bind()
    pod = lab.pod(server(model=MODEL), read_only=False).wait_running()
    assert list((lab.path / MODEL).iterdir()) == []
    assert pod.run("ls", "/model") == ""
    assert pod.events("Failed") == []

    publish(lab)  # over the empty directory, which works
    assert (lab.path / MODEL / "model.bin").exists()
    assert pod.run("ls", "/model") == ""

    pod.end()
    pod.wait_running(restarts=1)
    assert pod.run("cat", "/model/model.bin") == "weights"


def test_absent_subpath_of_a_read_only_claim_is_waited_for_and_heals_by_itself(lab: Lab) -> None:
    (lab.path / "models").mkdir(parents=True)
    lab.bind()
    pod = lab.pod(server(model=MODEL), read_only=True)
    until(lambda: pod.waits_for() == "CreateContainerConfigError", pod.describe, seconds=PATIENCE)
    until(lambda: len(pod.events("Failed")) > 1, pod.describe, seconds=PATIENCE)  # tried again
    failures = pod.events("Failed")
    assert all("failed to create subPath directory" in failure for failure in failures)
    assert list((lab.path / "models").iterdir()) == []

    publish(lab)
    pod.wait_running()
    assert pod.container()["restartCount"] == 0
    assert pod.run("cat", "/model/model.bin") == "weights"


@pytest.mark.parametrize("read_only", [True, False])
def test_rename_inside_a_mounted_parent_is_seen_at_once(lab: Lab, read_only: bool) -> None:
    (lab.path / "models").mkdir(parents=True)
    lab.bind()
    pod = lab.pod(server(models="models", volume=""), read_only=read_only).wait_running()
    publish(lab)
    both = pod.run("cat", f"/models/{KEY}/model.bin", f"/volume/{MODEL}/model.bin")
    assert both == "weightsweights"


@pytest.mark.parametrize("read_only", [True, False])
def test_rename_over_a_mounted_directory_is_never_seen(lab: Lab, read_only: bool) -> None:
    publish(lab, "first")
    lab.bind()
    pod = lab.pod(server(model=MODEL), read_only=read_only).wait_running()
    (lab.path / MODEL).rename(lab.path / "old")
    publish(lab, "second")
    assert pod.run("cat", "/model/model.bin") == "first"

    pod.end()
    pod.wait_running(restarts=1)
    assert pod.run("cat", "/model/model.bin") == "second"


def test_subpath_of_the_server_is_resolved_only_when_the_server_starts(lab: Lab) -> None:
    """So an init container may wait for the model that the server mounts."""
    (lab.path / "models").mkdir(parents=True)
    (lab.path / "flags").mkdir()
    lab.bind()
    waits = container("wait", "until [ -e /flags/go ]; do sleep 0.1; done", {"/flags": "flags"})
    pod = lab.pod(server(model=MODEL), read_only=True, init=[waits]).wait_running("wait")
    publish(lab)
    (lab.path / "flags/go").touch()
    pod.wait_running()
    assert pod.run("cat", "/model/model.bin") == "weights"
    assert pod.events("Failed") == []


@pytest.mark.parametrize(
    ("read_only", "mount_options", "changes"),
    [
        pytest.param(False, [], True, id="writable"),
        pytest.param(True, [], False, id="claim-read-only"),
        pytest.param(False, ["ro"], False, id="volume-read-only"),
    ],
)
def test_fs_group_changes_the_cache_unless_something_is_read_only(
    lab: Lab, read_only: bool, mount_options: list[str], changes: bool
) -> None:
    """Without that, one pod with an fsGroup makes every model writable for its group."""
    publish(lab)
    (lab.path / MODEL / "model.bin").chmod(0o444)
    before = _owners(lab.path)
    lab.bind(mount_options=mount_options)
    pod = lab.pod(
        server(model=MODEL), read_only=read_only, security={"runAsUser": 12345, "fsGroup": 4242}
    ).wait_running()
    assert pod.run("cat", "/model/model.bin") == "weights"
    after = _owners(lab.path)
    assert (after != before) == changes
    if changes:
        assert after[f"{MODEL}/model.bin"] == ("-rw-rw-r--", 0, 4242)
        assert after[MODEL] == ("drwxrwsr-x", 0, 4242)


def _owners(root: Path) -> dict[str, tuple[str, int, int]]:
    """Mode, owner and group of everything."""
    return {
        str(path.relative_to(root)): (filemode(found.st_mode), found.st_uid, found.st_gid)
        for path in root.rglob("*")
        for found in [path.stat()]
    }


def test_absent_directory_of_a_volume_is_tried_again_ever_more_seldom(lab: Lab) -> None:
    """So `prepare` makes it before any pod wants it: the longer it lacks, the later it is found."""
    lab.bind()
    pod = lab.pod(server(volume=""), read_only=True)

    def delays() -> list[str]:
        lines = [line for line in lab.node.log("kubelet").splitlines() if f'{lab.name}"' in line]
        return re.findall(r"durationBeforeRetry (\w+)", "\n".join(lines))

    until(lambda: len(delays()) >= 4, delays, seconds=PATIENCE)
    assert delays()[:4] == ["500ms", "1s", "2s", "4s"]
    until(lambda: pod.events("FailedMount"), pod.describe)
    assert "does not exist" in pod.events("FailedMount")[0]
    assert pod.waits_for() == "ContainerCreating"

    lab.path.mkdir(parents=True)
    pod.wait_running()


def test_pod_made_before_its_claim_is_bound_is_refused_once_by_the_scheduler(lab: Lab) -> None:
    """So claims are made ahead: a pod whose claim is bound is placed at the first attempt."""
    lab.path.mkdir(parents=True)
    lab.apply(claim(lab.name))
    early = lab.pod(server(volume=""), read_only=True)
    until(lambda: early.events("FailedScheduling"), early.describe)
    lab.apply(volume(lab.name, lab.path))
    early.wait_running()
    late = lab.pod(server(volume=""), read_only=True).wait_running()
    assert late.events("FailedScheduling") == []
