"""Which groups of a step each learner rank trains. Pure, and used by the driver.

Invariants:
- Importing this module loads no torch.
- The same token counts give the same shares.
"""

from __future__ import annotations

import heapq


def share_out(tokens: list[int], ranks: int) -> list[list[int]]:
    """Return, for every rank, the indices of the groups it trains, in the batch's order.

    The longest group is assigned first, each to the rank with the fewest tokens so far. tokens: token count of each
    group. A rank's share is empty if there are fewer groups than ranks.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    # (tokens, groups, rank): the count breaks ties, so that groups of no tokens spread over the ranks, too.
    loads = [(0, 0, rank) for rank in range(ranks)]
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        used, count, rank = heapq.heappop(loads)
        shares[rank].append(i)
        heapq.heappush(loads, (used + tokens[i], count + 1, rank))
    return [sorted(share) for share in shares]
