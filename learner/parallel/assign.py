"""Which groups of a step each learner rank trains.

Pure, and without torch: the driver shares the groups out. Invariant: the same tokens give the same shares.
"""

from __future__ import annotations

import heapq


def share_out(tokens: list[int], ranks: int) -> list[list[int]]:
    """Which of the groups of `tokens` each rank trains: longest first, always to the rank with the fewest tokens.

    Members keep the batch's order. A rank may stay empty if there are fewer groups than ranks.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, 0, rank) for rank in range(ranks)]
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        used, count, rank = heapq.heappop(loads)
        shares[rank].append(i)
        heapq.heappush(loads, (used + tokens[i], count + 1, rank))
    return [sorted(share) for share in shares]
