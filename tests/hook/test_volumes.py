"""Claims and volumes: what the plan makes of every state they can be in, step by step."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.hook.volumes import (
    Action,
    Claim,
    Create,
    Delete,
    Mend,
    Place,
    Volume,
    claim,
    claim_body,
    mounted,
    offered,
    plan,
    volume,
    volume_body,
    volume_name,
)
from agent.hook.world import Group

GPU = Group(
    name="gpu",
    selector=None,
    volume={
        "accessModes": ["ReadWriteOnce"],
        "capacity": {"storage": "500Gi"},
        "local": {"path": "/models"},
        "storageClassName": "local-storage",
        "persistentVolumeReclaimPolicy": "Delete",
        "claimRef": {"name": "somebody-elses"},
    },
    claim={"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "500Gi"}}},
)
PLACE = ("team-a", "gpu")


def test_the_volume_is_the_groups_read_only_and_already_ours() -> None:
    body = volume_body(PLACE, GPU)
    assert body["spec"]["mountOptions"] == ["ro"]
    assert body["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
    reference = body["spec"]["claimRef"]
    assert (reference["namespace"], reference["name"]) == ("team-a", "localmodel-gpu")
    assert body["spec"]["local"] == {"path": "/models"}
    made = claim_body(PLACE, GPU)
    assert made["spec"]["volumeName"] == body["metadata"]["name"]
    assert made["spec"]["storageClassName"] == "local-storage"
    assert made["spec"]["resources"] == GPU.claim["resources"]


def test_mount_options_are_kept_and_a_volume_on_the_host_path_has_none() -> None:
    options = replace(GPU, volume={**GPU.volume, "mountOptions": ["rw", "noatime"]})
    assert volume_body(PLACE, options)["spec"]["mountOptions"] == ["noatime", "ro"]
    on_host = replace(GPU, volume={"hostPath": {"path": "/models"}})
    assert "mountOptions" not in volume_body(PLACE, on_host)["spec"]
    assert claim_body(PLACE, on_host)["spec"]["storageClassName"] == ""


def test_names_do_not_run_together() -> None:
    """kserve.md 2.8: a + b-c and a-b + c."""
    assert volume_name(("a", "b-c")) != volume_name(("a-b", "c"))
    assert len(volume_name(("n" * 63, "g" * 253))) <= 253


def test_only_pods_that_run_use_a_claim() -> None:
    pod = {
        "metadata": {"namespace": "team-a"},
        "spec": {
            "volumes": [
                {"name": "a", "persistentVolumeClaim": {"claimName": "localmodel-gpu"}},
                {"name": "b", "persistentVolumeClaim": {"claimName": "other"}},
                {"name": "c", "emptyDir": {}},
            ]
        },
    }
    assert mounted(pod) == {PLACE}
    assert mounted({**pod, "status": {"phase": "Succeeded"}}) == frozenset()
    assert mounted({"metadata": {"namespace": "x"}, "spec": {"volumes": None}}) == frozenset()


class Cluster:
    """What the API server, and the controller that binds and releases volumes, make of actions."""

    def __init__(self) -> None:
        self.claims: dict[str, dict[str, Any]] = {}
        self.volumes: dict[str, dict[str, Any]] = {}
        self.used: set[Place] = set()
        self._number = 0

    def do(self, action: Action) -> None:
        self._number += 1
        match action:
            case Create(path=path, body=body):
                kept = self.volumes if path.endswith("persistentvolumes") else self.claims
                name = "/".join(
                    filter(None, (body["metadata"].get("namespace"), body["metadata"]["name"]))
                )
                assert name not in kept, "409"
                made = {**body, "metadata": {**body["metadata"], "uid": f"u{self._number}"}}
                kept[name] = {**made, "status": {}}
            case Delete(path=path, uid=uid):
                name = path.rpartition("/")[2]
                if "persistentvolumeclaims" in path:
                    name = f"{path.split('/')[4]}/{name}"
                    place = (path.split("/")[4], name.rpartition("localmodel-")[2])
                    assert place not in self.used, "a pod's claim"
                    assert self.claims.pop(name)["metadata"]["uid"] == uid
                else:
                    phase = self.volumes.pop(name)["status"].get("phase")
                    assert phase != "Bound", "it would stay, terminating"
            case Mend(path=path):
                found = self.volumes[path.rpartition("/")[2]]
                reference = dict(found["spec"]["claimRef"])
                reference.pop("uid", None)
                found["spec"] = {**found["spec"], "claimRef": reference}
                found["status"] = {"phase": "Available"}
        self.bind()

    def bind(self) -> None:
        for made in self.volumes.values():
            reference = made["spec"]["claimRef"]
            name = f"{reference['namespace']}/{reference['name']}"
            wanted = self.claims.get(name)
            if wanted is not None and reference.get("uid") in (None, wanted["metadata"]["uid"]):
                uid = wanted["metadata"]["uid"]
                made["spec"] = {**made["spec"], "claimRef": {**reference, "uid": uid}}
                made["status"] = wanted["status"] = {"phase": "Bound"}
            elif reference.get("uid"):
                made["status"] = {"phase": "Released"}
            else:
                made["status"] = {"phase": "Available"}
        for wanted in self.claims.values():
            if wanted["spec"]["volumeName"] not in self.volumes:
                was = wanted["status"].get("phase")
                wanted["status"] = {"phase": "Lost" if was in ("Bound", "Lost") else "Pending"}


class Kept(RuleBasedStateMachine):
    """Whatever people do to labels, groups, claims and volumes: it comes right, and no pod loses
    what it mounts."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()
        self.groups: dict[str, Group] = {"gpu": GPU}
        self.namespaces = {"team-a"}

    def seen(self, used: set[Place] | None) -> Any:
        return plan(
            self.groups.values(),
            self.namespaces,
            [claim(raw) for raw in self.cluster.claims.values()],
            [volume(raw) for raw in self.cluster.volumes.values()],
            used=used,
        )

    @property
    def offered(self) -> frozenset[Place]:
        """What the hook gives to pods."""
        return offered(
            self.groups.values(),
            self.namespaces,
            [claim(raw) for raw in self.cluster.claims.values()],
            [volume(raw) for raw in self.cluster.volumes.values()],
        )

    @rule(known=st.booleans())
    def turn(self, known: bool) -> None:
        for action in self.seen(self.cluster.used if known else None).actions.values():
            self.cluster.do(action)

    @rule(name=st.sampled_from(["team-a", "team-b"]))
    def label(self, name: str) -> None:
        self.namespaces ^= {name}

    @rule(name=st.sampled_from(["gpu", "h100"]), path=st.sampled_from(["/models", "/cache"]))
    def group(self, name: str, path: str) -> None:
        self.groups[name] = replace(GPU, name=name, volume={**GPU.volume, "local": {"path": path}})

    @rule(name=st.sampled_from(["gpu", "h100"]))
    def remove_group(self, name: str) -> None:
        self.groups.pop(name, None)

    @precondition(lambda self: self.cluster.claims)
    @rule(data=st.data())
    def start_a_pod(self, data: st.DataObject) -> None:
        if self.offered:
            self.cluster.used.add(data.draw(st.sampled_from(sorted(self.offered))))

    @rule()
    def end_all_pods(self) -> None:
        self.cluster.used.clear()

    @precondition(lambda self: self.cluster.claims)
    @rule(data=st.data())
    def delete_a_claim_by_hand(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.cluster.claims)))
        if claim(self.cluster.claims[name]).place not in self.cluster.used:  # pvc-protection
            del self.cluster.claims[name]
            self.cluster.bind()

    @precondition(lambda self: self.cluster.volumes)
    @rule(data=st.data())
    def delete_a_volume_by_force(self, data: st.DataObject) -> None:
        del self.cluster.volumes[data.draw(st.sampled_from(sorted(self.cluster.volumes)))]
        self.cluster.bind()

    @invariant()
    def what_a_pod_mounts_is_there(self) -> None:
        there = {claim(raw).place for raw in self.cluster.claims.values()}
        assert self.cluster.used <= there

    @invariant()
    def what_a_new_pod_gets_is_of_the_group_as_it_is(self) -> None:
        for place in self.offered:
            made = self.cluster.volumes[volume_name(place)]
            assert place[0] in self.namespaces
            assert made["status"]["phase"] == "Bound"
            assert made["spec"]["local"] == self.groups[place[1]].volume["local"]

    def teardown(self) -> None:
        """Left alone, it is as wanted within a few turns, and then nothing is done any more."""
        self.cluster.used.clear()
        for _ in range(6):
            self.turn(known=True)
        assert self.seen(set()).actions == {}
        wanted = {(space, group) for space in self.namespaces for group in self.groups}
        found = [claim(raw) for raw in self.cluster.claims.values()]
        assert {one.place for one in found if one.bound} == wanted == self.offered
        assert len(self.cluster.volumes) == len(found) == len(wanted)
        for made in self.cluster.volumes.values():
            name = made["metadata"]["annotations"]["localmodel-agent.io/node-group"]
            assert made["spec"]["local"] == self.groups[name].volume["local"]


TestKept = Kept.TestCase
TestKept.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("used", [None, {PLACE}])
def test_a_claim_that_may_be_in_use_waits(used: set[Place] | None) -> None:
    there = [Claim(name="localmodel-gpu", namespace="team-a", group="gpu", phase="Bound")]
    found = plan([GPU], [], there, [], used=used)
    assert not found.actions
    assert found.wait == {PLACE}


def _bound(**change: Any) -> tuple[Claim, Volume]:
    """A claim and its volume, as they are in the cluster."""
    status = {"status": {"phase": "Bound"}}
    return replace(claim({**claim_body(PLACE, GPU), **status}), **change), volume(
        {**volume_body(PLACE, GPU), **status}
    )


def test_a_claim_is_offered_while_it_is_to_stay() -> None:
    """Of a group whose selector was changed, the old volume would keep a pod Pending: where the
    new selector lets it run, that volume is not."""
    made, there = _bound()
    assert offered([GPU], ["team-a"], [made], [there]) == {PLACE}
    assert not offered([GPU], [], [made], [there]), "the namespace has lost its label"
    assert not offered([], ["team-a"], [made], [there]), "the group has gone"
    affinity: dict[str, Any] = {"required": {"nodeSelectorTerms": [{"matchExpressions": []}]}}
    changed = replace(GPU, volume={**GPU.volume, "nodeAffinity": affinity})
    assert not offered([changed], ["team-a"], [made], [there])
    assert not offered([GPU], ["team-a"], [made], [replace(there, deleting=True)])
    assert not offered([GPU], ["team-a"], [made], [])


@pytest.mark.parametrize(
    "change", [{"name": "mine"}, {"group": "h100"}, {"volume": "mine"}, {"phase": "Pending"}]
)
def test_a_claim_with_our_label_that_is_not_ours(change: dict[str, Any]) -> None:
    """Whoever may make claims in a namespace may write that: it is neither given to pods, nor taken
    for ours, nor deleted."""
    made, there = _bound(**change)
    others = replace(GPU, name="h100")
    assert not offered([GPU, others], ["team-a"], [made], [there])
    if made.ours:
        return
    found = plan([GPU], ["team-a"], [made], [there], used=set())
    assert list(found.actions.values()) == [
        Create(path=_CLAIMS, body=claim_body(PLACE, GPU)),
    ]


_CLAIMS = "/api/v1/namespaces/team-a/persistentvolumeclaims"


def test_what_is_going_is_waited_for() -> None:
    gone = Claim(
        name="localmodel-gpu", namespace="team-a", group="gpu", phase="Bound", deleting=True
    )
    assert not gone.bound
    assert plan([GPU], ["team-a"], [gone], [], used=set()).actions == {}
    going = Volume(name=volume_name(PLACE), spec_hash="other", phase="Released", deleting=True)
    assert plan([GPU], ["team-a"], [], [going], used=set()).actions == {}


@given(st.text(max_size=20))
def test_a_volume_of_nobody_is_removed(name: str) -> None:
    stray = Volume(name=f"localmodel-{name}", spec_hash="", phase="Released")
    found = plan([], [], [], [stray], used=None)
    assert [action.path for action in found.actions.values()] == [
        f"/api/v1/persistentvolumes/{stray.name}"
    ]
