"""What is kept by an index is what a comparison with everything would find."""

import time

from hypothesis import given
from hypothesis import strategies as st

from agent.hook.scheduling import Node
from agent.hook.world import Cache, Group, World
from tests.hook.pods import A100, H100, selector

PARTS = st.lists(st.sampled_from(["a", "b", "ab", "", ".."]), max_size=4)
URIS = st.builds(
    lambda parts, end: "/".join(["s3:", "", *parts]) + end, PARTS, st.sampled_from(["", "/"])
)


@given(uris=st.lists(URIS, max_size=6), asked=URIS)
def test_a_uri_finds_the_caches_that_hold_it(uris: list[str], asked: str) -> None:
    caches = tuple(Cache(name=str(n), uri=uri, groups=()) for n, uri in enumerate(uris))
    found = [one for one in World(caches=caches).holding(asked) if one.rest(asked) is not None]
    assert {one.name for one in found} == {c.name for c in caches if c.rest(asked) is not None}
    assert len(found) == len({one.name for one in found})


def test_a_uri_of_a_megabyte_takes_no_longer_than_its_megabyte() -> None:
    """A tenant writes it; everybody else's pods wait meanwhile."""
    caches = tuple(Cache(name=str(n), uri=f"s3://b/{'x' * n}", groups=()) for n in range(200))
    world = World(caches=caches)
    begun = time.process_time()
    assert [one.name for one in world.holding("s3://b/" + "x/" * 500_000)] == ["0", "1"]
    assert time.process_time() - begun < 0.1


def test_a_group_offers_what_any_of_its_nodes_has_and_no_other() -> None:
    product = "nvidia.com/gpu.product"
    nodes = (
        Node(name="a", labels={product: A100}, extended=frozenset({"nvidia.com/gpu"})),
        Node(name="b", labels={product: A100}, extended=frozenset({"rdma/ib"})),
        Node(name="h", labels={product: H100}, extended=frozenset({"nvidia.com/mig-1g.10gb"})),
    )
    groups = {
        "a100": Group(name="a100", selector=selector(A100)),
        "none": Group(name="none", selector=selector("other")),
        "shared": Group(name="shared", selector=None),
    }
    world = World(groups=groups, nodes=nodes)
    assert world.offered("a100") == {"nvidia.com/gpu", "rdma/ib"}
    assert world.offered("none") == frozenset()
    assert world.offered("shared") == {"nvidia.com/gpu", "rdma/ib", "nvidia.com/mig-1g.10gb"}
