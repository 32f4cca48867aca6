"""What plans consist of in generated worlds: `python -m tests.core.count_actions [WORLDS]`.

Look at it when the generator changes. A property about evictions says nothing if one world in a
hundred evicts.
"""

import sys
from collections import Counter

from hypothesis import HealthCheck, given, seed, settings

from agent.model import Blocked, Evict, Fetch, Plan
from tests.core.worlds import World, removable, room, worlds

KINDS = (
    *("Resolve", "Fetch", "Cancel", "Withdraw", "Evict", "Abandon", "Exchange"),
    *(why.value for why in Blocked),
)
MIXED = (
    *("Evict and Fetch", "Evict without Fetch", "Evict of what left"),
    *("begun beside InsufficientCapacity", "wake_at"),
)


def kinds_of(world: World, decided: Plan) -> set[str]:
    """What occurs in one plan."""
    found = {type(action).__name__ for action in decided.actions}
    found |= {block.why.value for block in decided.blocked.values()}
    begun = any(isinstance(action, Fetch) and action.bytes for action in decided.actions)
    left = removable(world)
    evicted = {action.key for action in decided.actions if isinstance(action, Evict)}
    if evicted & left:
        found.add("Evict of what left")
    if evicted - left:
        found.add("Evict and Fetch" if begun else "Evict without Fetch")
    if begun and Blocked.INSUFFICIENT_CAPACITY.value in found:
        found.add("begun beside InsufficientCapacity")
    if decided.wake_at is not None:
        found.add("wake_at")
    if room(world) < 0:
        found.add("above the high mark")
    return found


def count(number: int) -> Counter[str]:
    """In how many of so many worlds each occurs. The same number, the same worlds."""
    counts: Counter[str] = Counter()

    @seed(0)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(worlds())
    def look(world: World) -> None:
        counts["worlds"] += 1
        counts.update(kinds_of(world, world.plan()))

    look()
    return counts


def main() -> None:
    counts = count(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
    total = counts["worlds"]
    print(f"{'in ' + str(total) + ' worlds':<36}{'worlds':>8}{'share':>8}")
    for kind in (*KINDS, *MIXED, "above the high mark"):
        print(f"{kind:<36}{counts[kind]:>8}{counts[kind] / total:>8.1%}")


if __name__ == "__main__":
    main()
