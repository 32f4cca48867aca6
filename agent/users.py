"""Who uses a cache that is to be deleted: asked of the API server, and of nobody else.

Once in a while a person deletes a cache; who asks then may wait for the answer, unlike a pod.
"""

from agent.errors import AgentError
from agent.hook.review import Deletion
from agent.hook.validation import Users
from agent.kube import podspec
from agent.kube.client import Api, ApiError, Json


async def users_of(api: Api, deletion: Deletion) -> Users:
    """Raises ApiError where the server cannot tell: then it must not be deleted."""
    found = [await _service(api, path) for path in deletion.services]
    services = tuple(service for service in found if service is not None)
    return Users(services=services, pods=tuple(await _pods(api, deletion)))


async def _service(api: Api, path: str) -> Json | None:
    """None for one that is no more: KServe's own webhook would not let such a cache go."""
    try:
        return await api.get(path)
    except ApiError as error:
        if error.status != 404:
            raise
        return None


async def _pods(api: Api, deletion: Deletion) -> list[str]:
    """Those that rely on its key and have not ended."""
    where = f"/namespaces/{deletion.namespace}" if deletion.namespace else ""
    found = []
    async for page in api.pages(f"/api/v1{where}/pods"):
        for raw in page["items"] or ():
            try:
                pod = podspec.pod(raw)
            except (AgentError, LookupError, TypeError, AttributeError, ValueError):
                continue  # it has nothing of ours, which is well formed
            if deletion.key in pod.keys and not pod.finished:
                found.append(f"{pod.namespace}/{pod.name}")
    return sorted(found)
