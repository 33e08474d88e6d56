"""Pipeline stages of equal work: the best contiguous split of units by what each of them costs.

The costs are those of forward and backward together, which 1F1B alternates; the step takes as long as its
slowest stage allows, so the split minimises the largest stage. `parallel.unit_costs` measures costs on the
device at hand; `planning` predicts them where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from pgm_scale.errors import UserError


def split_units(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """How many consecutive units each stage gets, at least one, so that the largest stage costs least.

    Among the splits with that largest cost, the one with the least sum of squared stage costs is taken: its
    stages are the most even, so their memory is too; what is still equal puts the larger stages first.

    Raises:
        UserError: there are fewer units than stages.
    """
    units = len(costs)
    assert all(0 <= cost < math.inf for cost in costs), costs
    if not 1 <= stages <= units:
        raise UserError(f"{units} units cannot be split into {stages} pipeline stages; use 1 to {units}")
    prefix = [0.0, *accumulate(costs)]
    limit = _least_largest_sum(prefix, stages) * (1 + 1e-12)  # sums of floats are not exact

    # squares[k][j]: least sum of squares of units j.. in k stages within the limit.
    squares = [[math.inf] * (units + 1) for _ in range(stages + 1)]
    ends = [[0] * (units + 1) for _ in range(stages + 1)]
    squares[0][units] = 0.0
    for k in range(1, stages + 1):
        for start in range(stages - k, units - k + 1):
            for end in range(start + 1, units - k + 2):
                cost = prefix[end] - prefix[start]
                if cost > limit:
                    break
                total = cost * cost + squares[k - 1][end]
                if total <= squares[k][start] * (1 + 1e-12):
                    squares[k][start], ends[k][start] = total, end

    sizes, start = [], 0
    for k in range(stages, 0, -1):
        sizes.append(ends[k][start] - start)
        start = ends[k][start]
    return tuple(sizes)


def _least_largest_sum(prefix: list[float], stages: int) -> float:
    """The smallest bound within which `stages` consecutive parts fit: minimum over splits of the maximum.

    The textbook recursion over the last part; best[j] is for units 0 to j in the parts so far. A part that
    grows costs more while what is left costs less, so for each j the search stops where the two cross.
    """
    units = len(prefix) - 1
    best = prefix[:]
    for part in range(2, stages + 1):
        following = [math.inf] * (units + 1)
        for end in range(part, units + 1):
            for start in range(end - 1, part - 2, -1):
                last = prefix[end] - prefix[start]
                following[end] = min(following[end], max(best[start], last))
                if last >= best[start]:
                    break
        best = following
    return best[units]
