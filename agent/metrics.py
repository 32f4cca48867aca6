"""Every Prometheus metric of the program, on one page. `docs/metrics.md` is generated from it.

Base units, `_total` on counters only, labels from closed sets: no model, repository or pod name
multiplies a series. The node is the scrape target.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from agent import __version__
from agent.errors import AgentError, Reason
from agent.model import FilePolicy, Space, Traffic, Why
from agent.phases import Phase

Result = Literal["hit", "joined", "miss"]
FileKind = Literal["pickle", "safetensors"]
FILE_KINDS: tuple[FileKind, ...] = ("pickle", "safetensors")
RESULTS: tuple[Result, ...] = ("hit", "joined", "miss")

_GIB = 1024**3
_SIZE_CLASSES = ((_GIB, "lt1g"), (20 * _GIB, "1g-20g"), (100 * _GIB, "20g-100g"))
_SECONDS = (1, 5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400)


def size_class(size: int) -> str:
    """The class of a model's size in bytes: seconds are comparable only within one."""
    return next((name for limit, name in _SIZE_CLASSES if size < limit), "ge100g")


class Metrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        # A second series for every counter, which nobody reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        self.registry = registry
        self.requests = Counter(
            "localmodel_requests",
            "Models asked for: on offer (hit), on their way (joined), or neither (miss).",
            ["result"],
            registry=registry,
        )
        self.request_bytes = Counter(
            "localmodel_request_bytes",
            "Bytes of the models asked for, by the same results.",
            ["result"],
            registry=registry,
        )
        self.pod_wait_seconds = Histogram(
            "localmodel_pod_wait_seconds",
            "Seconds from a pod's arrival on the node until its model was on offer.",
            ["result"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.pods_bypassed = Counter(
            "localmodel_pods_bypassed",
            "Pods that download by themselves what this node's cache is there for: the hook was"
            " down, or left them alone.",
            registry=registry,
        )
        self.downloads = Counter(
            "localmodel_downloads",
            "Tries to bring a model to its seal, by result: ok or the reason of the failure.",
            ["source", "result"],
            registry=registry,
        )
        self.download_bytes = Counter(
            "localmodel_download_bytes",
            "Bytes received from a source, retries included.",
            ["source"],
            registry=registry,
        )
        self.linked_bytes = Counter(
            "localmodel_linked_bytes",
            "Bytes of files that a sealed model had already: hard-linked, not downloaded.",
            registry=registry,
        )
        self.adopted_bytes = Counter(
            "localmodel_adopted_bytes",
            "Bytes of files that another agent had left: hashed and hard-linked, not downloaded.",
            registry=registry,
        )
        self.download_seconds = Histogram(
            "localmodel_download_duration_seconds",
            "Seconds from the first byte asked for to the seal, of tries that succeeded.",
            ["source", "size_class"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.retries = Counter(
            "localmodel_download_retries",
            "Tries of one file that failed and were repeated within a download, by reason.",
            ["source", "reason"],
            registry=registry,
        )
        self.verifications = Counter(
            "localmodel_verifications",
            "Sealed models looked at again: names and sizes (look), every byte, on demand (hash)"
            " or after some days (scrub).",
            ["kind", "result"],
            registry=registry,
        )
        self.scrubbed_bytes = Counter(
            "localmodel_scrubbed_bytes",
            "Bytes of sealed models that were read and hashed again in the background.",
            registry=registry,
        )
        self.unsafe_models = Counter(
            "localmodel_unsafe_models",
            "Models whose files run code when they are loaded (pickle) or cannot be loaded"
            " (safetensors), sealed with a warning or refused.",
            ["kind", "policy"],
            registry=registry,
        )
        self.evictions = Counter(
            "localmodel_evictions",
            "Sealed models retired: for room, or because they left, expired or were asked to go.",
            ["why"],
            registry=registry,
        )
        self.evicted_bytes = Counter(
            "localmodel_evicted_bytes", "Bytes that retired models gave back.", registry=registry
        )
        self.ghost_hits = Counter(
            "localmodel_ghost_hits",
            "Models fetched again within 7 days of their eviction: a larger disk had held them.",
            registry=registry,
        )
        self.ghost_bytes = Counter(
            "localmodel_ghost_bytes", "Bytes of these models when they went.", registry=registry
        )
        self.models = Gauge("localmodel_models", "Models by state.", ["state"], registry=registry)
        self.stored_bytes = Gauge(
            "localmodel_stored_bytes",
            "Bytes on disk: on offer (sealed), begun (partial), still to come (reserved).",
            ["kind"],
            registry=registry,
        )
        self.turns = Counter(
            "localmodel_reconcile", "Turns of the reconcile loop.", ["result"], registry=registry
        )
        self.last_turn = Gauge(
            "localmodel_reconcile_last_success_timestamp_seconds",
            "When the reconcile loop last finished a turn, Unix seconds.",
            registry=registry,
        )
        self.illegal_transitions = Counter(
            "localmodel_illegal_transitions",
            "Changes of state that docs/states.md does not know: each is a bug.",
            registry=registry,
        )
        _tell_version(registry)
        self._preset()

    def _preset(self) -> None:
        """Series that exist from the start: a rate over a series that appears late is blind."""
        for asked in RESULTS:
            self.requests.labels(result=asked)
            self.request_bytes.labels(result=asked)
            self.pod_wait_seconds.labels(result=asked)
        for phase in Phase:
            self.models.labels(state=phase.value)
        for kind in ("sealed", "partial", "reserved"):
            self.stored_bytes.labels(kind=kind)
        for kind in ("look", "hash", "scrub"):
            for result in ("ok", "damaged"):
                self.verifications.labels(kind=kind, result=result)
        for found in FILE_KINDS:
            for policy in (FilePolicy.WARN, FilePolicy.REFUSE):
                self.unsafe_models.labels(kind=found, policy=policy.value)
        for why in Why:
            self.evictions.labels(why=why.value)
        for result in ("ok", "failed"):
            self.turns.labels(result=result)

    def download_failed(self, source: str, reason: Reason) -> None:
        self.downloads.labels(source=source, result=reason.value).inc()

    def download_done(self, source: str, *, size: int, seconds: float) -> None:
        self.downloads.labels(source=source, result="ok").inc()
        self.download_seconds.labels(source=source, size_class=size_class(size)).observe(seconds)

    def watch_disk(
        self,
        root: Path,
        space: Callable[[Path], Space],
        traffic: Callable[[Path], tuple[str, Traffic] | None],
    ) -> None:
        """Export the file system and the device of the cache, read at every scrape."""
        self.registry.register(_DiskCollector(root, space, traffic))


class _DiskCollector:
    """Asks the disk when Prometheus asks us. A disk that does not answer has no series."""

    def __init__(
        self,
        root: Path,
        space: Callable[[Path], Space],
        traffic: Callable[[Path], tuple[str, Traffic] | None],
    ) -> None:
        self._root = root
        self._space = space
        self._traffic = traffic

    def collect(self) -> Iterable[Metric]:
        capacity = GaugeMetricFamily(
            "localmodel_filesystem_capacity_bytes", "Size of the cache's file system."
        )
        free = GaugeMetricFamily(
            "localmodel_filesystem_available_bytes", "What the agent may still write there."
        )
        try:
            space = self._space(self._root)
            capacity.add_metric([], space.capacity)
            free.add_metric([], space.free)
        except AgentError:
            pass  # absent is the right answer; the reconcile loop reports why
        return [capacity, free, *self._device()]

    def _device(self) -> Iterable[Metric]:
        moved = CounterMetricFamily(
            "localmodel_disk_bytes",
            "Bytes moved by the block device of the cache since boot.",
            labels=["device", "direction"],
        )
        busy = CounterMetricFamily(
            "localmodel_disk_seconds",
            "Seconds that requests to the block device of the cache took since boot.",
            labels=["device", "direction"],
        )
        try:
            found = self._traffic(self._root)
        except OSError:
            found = None
        if found is not None:
            device, numbers = found
            moved.add_metric([device, "read"], numbers.read_bytes)
            moved.add_metric([device, "write"], numbers.written_bytes)
            busy.add_metric([device, "read"], numbers.read_seconds)
            busy.add_metric([device, "write"], numbers.write_seconds)
        return [moved, busy]

    def describe(self) -> Iterable[Metric]:
        """Names without asking the disk: registering must not touch it."""
        return []


class HookMetrics:
    """Those of a controller."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        self.registry = registry
        self.pods = Counter(
            "localmodel_hook_pods",
            "Pods that the hook was asked about, by what it did with them or why it left them"
            " alone (docs/hook.md).",
            ["outcome"],
            registry=registry,
        )
        self.validations = Counter(
            "localmodel_hook_validations",
            "Caches that the hook was asked about, by what it answered (docs/hook.md).",
            ["outcome"],
            registry=registry,
        )
        self.seconds = Histogram(
            "localmodel_hook_duration_seconds",
            "Seconds from a whole request to its answer.",
            ["path"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 3),
            registry=registry,
        )
        self.certificate_expiry = Gauge(
            "localmodel_hook_certificate_expiry_timestamp_seconds",
            "When the certificate ends that the hook shows, as Unix time.",
            registry=registry,
        )
        self.leader = Gauge(
            "localmodel_controller_leader",
            "1 where this replica keeps claims and certificates.",
            registry=registry,
        )
        self.claims = Gauge(
            "localmodel_controller_claims",
            "Claims of ours, by whether pods can use them.",
            ["state"],
            registry=registry,
        )
        self.claims_waiting = Gauge(
            "localmodel_controller_claims_waiting",
            "Claims that are not wanted any more, or are to be made anew, and that pods still use.",
            registry=registry,
        )
        _tell_version(registry)


def _tell_version(registry: CollectorRegistry) -> None:
    build = Gauge(
        "localmodel_build_info",
        "Always 1; the version of the program.",
        ["version"],
        registry=registry,
    )
    build.labels(version=__version__).set(1)
