"""The credentials that a cache names, on the real API server and under the shipped roles."""

import json
from pathlib import Path

from tests.cluster.identity import JOBS
from tests.cluster.nodes import Node, cache, storage_container
from tests.conftest import FILES, REPO, URI
from tests.fakes.hub import Hub
from tests.fakes.s3 import KEY, REGION, SECRET, Store
from tests.fakes.wire import make_certificates
from tests.machine import files_of, until

DOWNLOADED = "ModelDownloaded"
FAILED = "ModelDownloadError"
PENDING = "ModelDownloadPending"
TOKEN = "hf_sesame_of_one_cache"


def _entry(node: Node, **extra: object) -> dict[str, object]:
    return {"modelName": "tiny", "sourceModelUri": URI, "nodeGroup": node.group, **extra}


def _put_secret(node: Node, name: str, **values: str) -> None:
    node.plane.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": JOBS},
            "stringData": values,
        }
    )


def test_a_secret_that_is_made_later_lets_the_model_in(node: Node, hub: Hub) -> None:
    """Named and missing, it is said; made, it is found by itself at the next try, within a minute;
    and it is shown nowhere."""
    hub.accept(TOKEN)
    hub.private(REPO, tokens=[TOKEN])
    key = f"key-{node.name}"
    node.want_entries(_entry(node, storage={"key": key}))
    agent = node.start()
    node.wait_words(agent, tiny=FAILED)
    model = node.status()["models"]["tiny"]
    assert model["reason"] == "Unauthorized"
    assert f"Secret {JOBS}/storage-config" in model["message"]
    assert hub.bytes_sent() == 0

    _put_secret(node, "storage-config", **{key: json.dumps({"type": "hf", "token": TOKEN})})
    node.wait_words(agent, 90.0, tiny=DOWNLOADED)
    assert files_of(node.machine.model(URI)) == FILES
    seen = agent.log_text() + json.dumps(node.object()) + json.dumps(node.events())
    assert TOKEN not in seen
    assert TOKEN not in node.machine("show", URI).ok().stdout
    assert TOKEN not in agent.get("/metrics")[1]


def test_a_service_account_leads_to_the_token(node: Node, hub: Hub) -> None:
    hub.accept(TOKEN)
    hub.private(REPO, tokens=[TOKEN])
    account = f"puller-{node.name}"
    _put_secret(node, f"token-{node.name}", HF_TOKEN=TOKEN)
    node.plane.apply(_account(account, f"token-{node.name}"))
    node.want_entries(_entry(node, serviceAccountName=account))
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED)
    until(lambda: files_of(node.machine.model(URI)) == FILES, agent.log_text)


def test_9_1_11_keys_and_a_private_authority_lead_to_an_object_store(
    node: Node, tmp_path: Path
) -> None:
    """The authority is in a ConfigMap that the Secret names; the agent's log and status hold
    neither key."""
    (tmp_path / "certificates").mkdir()
    certificates = make_certificates(tmp_path / "certificates")
    name = f"minio-{node.name}"
    with Store(tls=certificates.server) as store:
        store.put("models", {f"tiny/{path}": data for path, data in FILES.items()})
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": name,
                "namespace": JOBS,
                "annotations": {
                    "serving.kserve.io/s3-endpoint": store.endpoint,
                    "serving.kserve.io/s3-region": REGION,
                    "serving.kserve.io/s3-cabundle-configmap": name,
                },
            },
            "stringData": {"awsAccessKeyID": KEY, "awsSecretAccessKey": SECRET},
        }
        node.plane.apply(secret, _account(name, name))
        uri = "s3://models/tiny"
        node.want_entries(_entry(node, sourceModelUri=uri, serviceAccountName=name))
        agent = node.start()
        node.wait_words(agent, tiny=FAILED)
        assert f"ConfigMap {JOBS}/{name}" in node.status()["models"]["tiny"]["message"]

        bundle = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": JOBS},
            "data": {"cabundle.crt": certificates.authority.read_text()},
        }
        node.plane.apply(bundle)
        entry = _entry(node, sourceModelUri=uri, serviceAccountName=name)
        node.want_entries({**entry, "modelName": "again"})  # a new wish is tried at once
        node.wait_words(agent, again=DOWNLOADED)
        assert files_of(node.machine.model(uri)) == FILES
        assert agent.stop() == 0
    seen = agent.log_text() + json.dumps(node.object()) + json.dumps(node.events())
    assert SECRET not in seen
    assert KEY not in seen


def test_9_1_12_the_patterns_of_a_storage_container_choose_the_files(node: Node, hub: Hub) -> None:
    """What they are now, and not only at the first download; what stays is not fetched again."""
    repository = f"acme/for-{node.name}"
    uri = f"hf://{repository}"
    hub.add(repository, {"a.json": b"{}", "a.bin": b"b" * 50_000, "a.txt": b"text"})
    name = f"files-of-{node.name}"

    def allow(patterns: str) -> None:
        variable = {"name": "STORAGE_ALLOW_PATTERNS", "value": patterns}
        node.plane.apply(storage_container(name, uri, variable))

    def files() -> set[str]:
        return set(files_of(node.machine.model(uri)))

    allow('["*.json", "*.bin"]')
    node.want(chosen=uri)
    agent = node.start()
    node.wait_words(agent, chosen=DOWNLOADED)
    assert files() == {"a.json", "a.bin"}

    hub.clear()
    allow("*.txt,*.bin")
    until(lambda: files() == {"a.txt", "a.bin"}, agent.log_text)
    node.wait_words(agent, chosen=DOWNLOADED)
    assert hub.bytes_sent("a.bin") == 0

    # Who has patterns of its own has these.
    node.plane.apply(cache("chosen", uri, [node.group], include="*.json"))
    until(lambda: files() == {"a.json"}, agent.log_text)
    node.plane.kubectl("delete", "clusterstoragecontainer", name)
    node.plane.kubectl("delete", "localmodelcache", "chosen")
    until(lambda: files() == {"a.json", "a.bin", "a.txt"}, agent.log_text)


def test_a_cache_of_a_namespace_has_what_its_own_token_may_have(node: Node, hub: Hub) -> None:
    """The bytes are here by another's token. The hub shows a gated repository to everybody and
    gives it to few, so that a listing alone would prove nothing (design D12)."""
    right, wrong = f"hf_right_{node.name}", f"hf_wrong_{node.name}"
    hub.accept(wrong)
    hub.gate(REPO, tokens=[TOKEN, right])
    accounts = {"common": TOKEN, "right": right, "wrong": wrong}
    for name, token in accounts.items():
        _put_secret(node, f"{name}-{node.name}", HF_TOKEN=token)
        node.plane.apply(_account(f"{name}-{node.name}", f"{name}-{node.name}"))

    def mine(namespace: str, account: str) -> dict[str, object]:
        named = f"{account}-{node.name}"
        return _entry(node, namespace=namespace, modelName="mine", serviceAccountName=named)

    common = _entry(node, serviceAccountName=f"common-{node.name}")
    node.want_entries(common)
    agent = node.start()
    node.wait_words(agent, tiny=DOWNLOADED)
    sent = hub.bytes_sent()

    entries = (common, mine("team-a", "right"), mine("team-b", "wrong"))
    node.want_entries(*entries)
    words = {"tiny": DOWNLOADED, "team-a/mine": DOWNLOADED, "team-b/mine": FAILED}
    node.wait_words(agent, **words)
    assert hub.bytes_sent() - sent < 100, "a byte of it, and not the model"
    model = node.status()["models"]["team-b/mine"]
    assert model["reason"] == "Gated"
    assert "not by the credentials of this cache" in model["message"]
    assert not {"fingerprint", "revision", "bytes"} & {k for k, v in model.items() if v}
    seen = agent.log_text() + json.dumps(node.object())
    assert not [token for token in accounts.values() if token in seen]

    # What was proven stays, over a restart and while the hub is away; what was not, does not come.
    agent.kill()
    hub.stop()
    agent = node.start()
    node.wait_condition(agent, "Ready", "False", "ModelsNotReady")
    until(
        lambda: node.status()["models"]["team-b/mine"].get("reason") == "Unproven", agent.log_text
    )
    waits = {**words, "team-b/mine": PENDING}
    node.wait_words(agent, **waits)
    hub.start()

    # Credentials that were mended lead to it, and take nothing from anybody meanwhile.
    _put_secret(node, f"wrong-{node.name}", HF_TOKEN=right)
    node.want_entries(*entries[:2], mine("team-b", "right"))
    node.wait_words(agent, **{**words, "team-b/mine": DOWNLOADED})


def _account(name: str, secret: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": name, "namespace": JOBS},
        "secrets": [{"name": secret}],
    }
