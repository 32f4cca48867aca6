"""What may become of a pod, in one closed vocabulary. Pure.

The table of `docs/hook.md` is made of this one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from agent.hook.spec import WARNING, Json, cut
from agent.model import CacheKey


class Why(StrEnum):
    """Why a pod is left as it is. The values are public: in the audit annotation and a metric."""

    NOT_OURS = "NotOurs"
    DISABLED = "Disabled"
    WRITES = "Writes"
    DONE = "Done"
    NO_CACHE = "NoCache"
    NO_SUCH_CACHE = "NoSuchCache"
    NO_CLAIM = "NoClaim"
    NO_AGENT = "NoAgent"
    OTHER_NODES = "OtherNodes"
    UNKNOWN_IMAGE = "UnknownImage"
    PATTERNS = "Patterns"
    CONFIDENTIAL = "Confidential"
    ODD = "Odd"


@dataclass(frozen=True, slots=True)
class Explained:
    """What a reason means, and what somebody can do who wants the cache; "" for nothing."""

    means: str
    advice: str = ""


EXPLAINED: Mapping[Why, Explained] = {
    Why.NOT_OURS: Explained("it neither downloads a model nor names one"),
    Why.DISABLED: Explained("an annotation opts it out", "remove the annotation"),
    Why.WRITES: Explained(
        'it is to write to its model (storage.kserve.io/readonly: "false")',
        "remove the annotation: what is in the cache is read-only",
    ),
    Why.DONE: Explained("it was helped before: the hook is called again when others change a pod"),
    Why.NO_CACHE: Explained(
        "no cache has its model", "create a LocalModelCache of exactly this URI"
    ),
    Why.NO_SUCH_CACHE: Explained(
        "no cache has what it names", "correct the annotation, or create the cache or its group"
    ),
    Why.NO_CLAIM: Explained(
        "the claim of the node group is not bound in its namespace",
        "label the namespace localmodel-agent.io/inject=enabled and look at the claim",
    ),
    Why.NO_AGENT: Explained(
        "a node of the group has no living agent", "look at the agent's pods on these nodes"
    ),
    Why.OTHER_NODES: Explained(
        "it could run on nodes outside of the group, and does not name the group",
        "set the annotation serving.kserve.io/nodegroup, or a nodeSelector",
    ),
    Why.UNKNOWN_IMAGE: Explained(
        "the entrypoint of its initializer's image is not known",
        "set the container's command, or name the image in the controller's --entrypoints",
    ),
    Why.PATTERNS: Explained(
        "it downloads other files of the model than the cache holds",
        "remove the patterns on both sides",
    ),
    Why.CONFIDENTIAL: Explained(
        "its model is decrypted by the initializer", "nothing: it is downloaded as before"
    ),
    Why.ODD: Explained("its shape is not one that the hook knows", "mend what is named"),
}

QUIET = frozenset({Why.NOT_OURS, Why.DISABLED, Why.DONE, Why.NO_CACHE, Why.WRITES})
"""Not worth a warning: nobody expected anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """A JSON Patch, and in one line what it does. `group` is the node group whose cache the pod
    reads, "" where KServe's claim does not say it."""

    patch: tuple[Json, ...]
    note: str
    keys: tuple[CacheKey, ...]
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """The pod stays as it is."""

    why: Why
    detail: str = ""

    @property
    def message(self) -> str:
        """Fit for a warning: a long detail is cut, what to do is not."""
        explained = EXPLAINED[self.why]
        said = f"not from the node's cache: {explained.means}"
        advice = f"; {explained.advice}" if explained.advice else ""
        room = WARNING - len(said) - len(advice) - 2
        return f"{said}{f': {cut(self.detail, room)}' if self.detail else ''}{advice}"


class Left(Exception):
    """A reason to leave the pod, found anywhere on the way to its patch."""

    def __init__(self, why: Why, detail: str = "") -> None:
        super().__init__(why)
        self.skip = Skip(why=why, detail=detail)
