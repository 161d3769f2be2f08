"""Which k of n candidate weights to prune: binary quadratic problems of fixed cardinality, and their solvers.

E(x) = const + xᵀQx over x in {0,1}ⁿ with Σx = k; x_i = 1 means that candidate i is pruned. Written for iCBS
(Rosenberg et al. 2024, arXiv:2411.17796) and its parent CBS (Yu et al. 2022, arXiv:2203.04466), whose blocks are
such problems, and usable for any choice of blocks or heads that is phrased this way.

A swap takes a out of the pruned set and b into it. With the field f = Qx it changes the energy by

    Q_aa − 2 f_a + Q_bb + 2 f_b − 2 Q_ab,

and the field by Q_b − Q_a. All solvers but the enumeration move by swaps, so the count never changes. With
`groups` both ends of a swap lie in one group, so every group keeps its own count: N:M masks are searched this way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations, islice, product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from billhook.errors import BillhookError, nearest
from billhook.system import finite

_DENSE = 4096  # candidates up to which Q is held whole: 128 MiB in float64
_ENTRIES = 1 << 19  # entries of Q that a temporary may hold: 4 MiB, which a cache may hold too
_FIRST_ROWS = 32


@dataclass(frozen=True, eq=False)
class Problem:
    """E(x) = const + xᵀQx, with Q whole (`matrix`) or as FᵀF + diag(linear) (`factor`, `linear`).

    Everything is turned into float64. Only the symmetric part of a given matrix enters the energy, so that is
    what is kept. Products with the low-rank form cost O(S n) and need no n² memory.

    Attributes:
        matrix: Q, [n, n]; None where the low-rank form is used.
        factor: F, [S, n]; with `linear`, [n].
        const: the constant term.

    Raises:
        BillhookError: neither form or both are given, shapes do not fit, or an entry is not finite.
    """

    matrix: Tensor | None = None
    factor: Tensor | None = None
    linear: Tensor | None = None
    const: float = 0.0

    def __post_init__(self) -> None:
        matrix, factor, linear = (
            None if part is None else part.detach().double() for part in (self.matrix, self.factor, self.linear)
        )
        if matrix is not None and factor is None and linear is None:
            if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
                raise BillhookError(f"Q has shape {list(matrix.shape)}: give a square matrix [n, n].")
            if not torch.equal(matrix, matrix.T) and finite(matrix):
                matrix = (matrix + matrix.T) / 2
        elif matrix is None and factor is not None and linear is not None:
            if factor.ndim != 2 or linear.shape != factor.shape[1:] or not len(linear):
                raise BillhookError(
                    f"The low-rank form has a factor {list(factor.shape)} and linear terms {list(linear.shape)}: give "
                    "[S, n] and [n]."
                )
        else:
            raise BillhookError("A problem is given either by a matrix, or by a factor and linear terms.")
        for name, value in (("matrix", matrix), ("factor", factor), ("linear", linear)):
            if value is not None and not finite(value):
                raise BillhookError(
                    f"The {name} of the quadratic problem has NaN or infinite entries: check the gradients and weights "
                    "it was built from."
                )
            object.__setattr__(self, name, value)
        if not math.isfinite(self.const):
            raise BillhookError("The constant of the quadratic problem is not finite: check what it was built from.")

    @cached_property
    def diagonal(self) -> Tensor:
        """The diagonal of Q, float64 [n]."""
        if self.matrix is not None:
            return self.matrix.diagonal().clone()
        factor, linear = self._low_rank
        return factor.square().sum(0) + linear

    @property
    def n(self) -> int:
        """The number of candidates."""
        return len(self.diagonal)

    @cached_property
    def tolerance(self) -> float:
        """Differences of energies below this are rounding: 4 ε n max|Q|."""
        if self.matrix is not None:
            peak = float(self.matrix.abs().max())
        else:
            factor, linear = self._low_rank
            peak = float(factor.square().sum(0).max()) + float(linear.abs().max())  # Cauchy-Schwarz
        return 4 * torch.finfo(torch.float64).eps * self.n * peak

    def energy(self, x: Tensor) -> Tensor:
        """const + xᵀQx for x [..., n] of zeros and ones, float64 [...]."""
        x = x.to(self.diagonal)
        return (self.field(x) * x).sum(-1) + self.const

    def field(self, x: Tensor) -> Tensor:
        """Qx for x [..., n], float64 [..., n]."""
        x = x.to(self.diagonal)
        if self.matrix is not None:
            return x @ self.matrix
        factor, linear = self._low_rank
        return (x @ factor.T) @ factor + x * linear

    def rows(self, index: Tensor) -> Tensor:
        """Q[index], float64 [len(index), n]; a copy."""
        if self.matrix is not None:
            return self.matrix[index]
        factor, linear = self._low_rank
        result = factor[:, index].T @ factor
        result[torch.arange(len(index), device=result.device), index] += linear[index]
        return result

    def scale(self) -> float:
        """The mean absolute value of the non-zero entries of Q; 0 if there are none."""
        total, count = 0.0, 0
        for index in torch.split(torch.arange(self.n, device=self.diagonal.device), _rows_at_once(self.n)):
            rows = self.rows(index)
            total += float(rows.abs().sum())
            count += int(torch.count_nonzero(rows))
        return total / max(count, 1)

    @property
    def _low_rank(self) -> tuple[Tensor, Tensor]:
        assert self.factor is not None
        assert self.linear is not None
        return self.factor, self.linear


def block_problem(
    gradients: Tensor, w0: Tensor, w: Tensor, *, alpha: float = 0.75, ridge: float = 1e-3, dense: bool | None = None
) -> Problem:
    """The second-order model of the loss of every mask of a block of weights (iCBS; CBS with alpha = ridge = 0).

    A candidate has the value 0 where x_i = 1 and its original value where x_i = 0, so from the current weights the
    step is δ(x) = w0∘(1 − x) − w. With d = w − w0, g the mean of the gradients and H = GᵀG / S (empirical Fisher),

        E(x) = α gᵀδ + ½ δᵀHδ + λ‖δ‖²   holds exactly for every x, with
        Q_ij = ½ w0_i H_ij w0_j,
        Q_ii = ½ w0_i² H_ii + w0_i (Hd)_i − α g_i w0_i + λ w0_i (2 d_i + w0_i),
        const = ½ dᵀHd − α gᵀd + λ dᵀd.

    The present mask has energy 0. H is never formed.

    Args:
        gradients: G, [S, n]: row s is the gradient of sample s's loss at the current weights.
        w0: original values of the block's weights, [n].
        w: their values now, [n]: zero where pruned, w0 elsewhere.
        alpha: multiplier of the gradient term; below 1 it tames overshoot, since the Fisher is not the Hessian.
        ridge: λ, a price on every change. Above 0 it decides where S < n samples see no curvature.
        dense: hold Q whole; by default for n <= 4096.

    Raises:
        BillhookError: shapes do not fit, there is no sample, or a value is not finite.
    """
    if gradients.ndim != 2 or not gradients.numel() or w0.shape != gradients.shape[1:] or w.shape != w0.shape:
        raise BillhookError(
            f"Gradients {list(gradients.shape)}, original weights {list(w0.shape)} and current weights "
            f"{list(w.shape)} do not fit: give [S, n], [n] and [n] with at least one sample and one weight."
        )
    given = {"per-sample gradients": gradients, "original weights": w0, "current weights": w}
    for what, value in given.items():
        if not finite(value):
            raise BillhookError(f"The {what} of the block have NaN or infinite values: check the model's loss.")
    samples = len(gradients)
    per_sample, original = gradients.detach().double(), w0.detach().double()
    d = w.detach().double() - original
    mean = per_sample.mean(0)
    along = per_sample @ d  # G_s · d
    curved = per_sample.T @ along / samples  # Hd
    linear = original * (curved - alpha * mean + ridge * (2 * d + original))
    const = along.square().sum() / (2 * samples) - alpha * (mean @ d) + ridge * (d @ d)
    factor = per_sample * (original / math.sqrt(2 * samples))
    if dense is None:
        dense = len(original) <= _DENSE
    if not dense:
        return Problem(factor=factor, linear=linear, const=float(const))
    matrix = factor.T @ factor
    matrix.diagonal().add_(linear)
    return Problem(matrix=matrix, const=float(const))


Solver = Callable[..., Tensor]
_SOLVERS: dict[str, Solver] = {}


def solver(name: str) -> Callable[[Solver], Solver]:
    """Decorator: make a solver known by name.

    A solver is called as f(problem, start, groups, restarts, generator, **options) with a feasible bool mask
    [n], group numbers int64 [n] or None, and a private CPU generator; it returns a bool mask [n] with the same
    count in every group. It need not compare with the start: `solve` does.
    """

    def register(function: Solver) -> Solver:
        _SOLVERS[name] = function
        return function

    return register


def solvers() -> list[str]:
    """Names of all solvers."""
    return sorted(_SOLVERS)


def solve(
    problem: Problem,
    k: int,
    start: Tensor,
    *,
    solver: str = "swap",
    restarts: int = 1,
    seed: int = 0,
    groups: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, float]:
    """A mask of k ones with low energy, never worse than `start`.

    Args:
        problem: what is minimised.
        k: number of ones.
        start: the incumbent, [n], bool or zeros and ones, with exactly k ones. It is returned unless the solver
            finds a mask whose energy is lower by more than rounding.
        solver: "swap" (steepest descent), "anneal", "local" (CBS-S) or "exact" (enumeration).
        restarts: independent runs of which the best counts. "anneal": all from `start`, with different random
            numbers. "swap" and "local": the first from `start`, the others from uniformly random feasible masks.
        seed: of a generator private to this call; the same seed gives the same result.
        groups: int [n], the group of each candidate; the number of ones in each group stays that of `start`.
        options: of the solver, see its function.

    Returns:
        (x, energy): bool [n] on the problem's device, and E(x).

    Raises:
        BillhookError: unknown solver, k or restarts out of range, or a start or groups that do not fit.
    """
    if solver not in _SOLVERS:
        raise BillhookError(f"No solver {solver!r}{nearest(solver, _SOLVERS)}: there are {', '.join(solvers())}.")
    if not 0 <= k <= problem.n:
        raise BillhookError(f"k is {k}, but of {problem.n} candidates between 0 and {problem.n} can be pruned.")
    if restarts < 1:
        raise BillhookError(f"restarts is {restarts}, but must be at least 1.")
    device = problem.diagonal.device
    if start.shape != (problem.n,) or not bool(((start == 0) | (start == 1)).all()):
        raise BillhookError(f"The start of shape {list(start.shape)} must be {problem.n} zeros and ones.")
    incumbent = start.to(device=device, dtype=torch.bool)
    ones = int(incumbent.sum())
    if ones != k:
        raise BillhookError(
            f"The start prunes {ones} candidates, but k is {k}: give a start that meets the constraint."
        )
    if groups is not None:
        if groups.shape != (problem.n,) or groups.is_floating_point():
            raise BillhookError(f"The groups must be {problem.n} integers, one for each candidate.")
        groups = torch.unique(groups.to(device), return_inverse=True)[1]
    generator = torch.Generator().manual_seed(seed)
    found = _SOLVERS[solver](problem, incumbent.clone(), groups, restarts, generator, **options)
    if not torch.equal(_counts(found, groups), _counts(incumbent, groups)):
        raise BillhookError(f"Solver {solver!r} returned a mask with other counts than the start: mend the solver.")
    before, after = float(problem.energy(incumbent)), float(problem.energy(found))
    return (found, after) if after < before - problem.tolerance else (incumbent, before)


def swap_costs(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The change of energy of every swap.

    Returns:
        (a, b, cost): the ones of x, int64 [k]; the zeros, int64 [n − k]; and float64 [k, n − k], the change when
        a_i is revived and b_j pruned in its place. CBS writes it −α_i + β_j − γ_ij.
    """
    x = x.bool()
    a, b = x.nonzero()[:, 0], (~x).nonzero()[:, 0]
    field, diagonal = problem.field(x), problem.diagonal
    cost = -2 * problem.rows(a)[:, b]
    cost += (diagonal - 2 * field)[a, None]
    cost += (diagonal + 2 * field)[b]
    return a, b, cost


class Swap(NamedTuple):
    """One accepted move: `revived` leaves the pruned set, `pruned` enters it, the energy changes by `cost` < 0."""

    revived: int
    pruned: int
    cost: float


def steepest_swaps(problem: Problem, x: Tensor, groups: Tensor | None = None) -> Iterator[Swap]:
    """Steepest descent: at each step the best of all swaps, until none lowers the energy.

    Between two steps every row of the table of swap costs keeps a lower bound on its smallest entry. Only rows
    whose bound could still win are computed anew: the result is that of the full table.

    Args:
        x: bool [n], the start; changed in place along with what is yielded.
        groups: int64 [n], numbered from 0.

    Yields:
        Every swap, after it was made.
    """
    diagonal, inf = problem.diagonal, math.inf
    members = torch.zeros_like(x, dtype=torch.int64) if groups is None else groups
    field = problem.field(x)
    # For a pruned i: at most the smallest Q_bb + 2 f_b − 2 Q_ib over its partners b.
    bound = torch.full_like(diagonal, -inf)
    chunk = _rows_at_once(problem.n)
    while True:
        enter = (diagonal + 2 * field).masked_fill_(x, inf)
        leave = diagonal - 2 * field
        least = torch.where(x, leave + bound, inf)
        best = Swap(-1, -1, -problem.tolerance)
        size = _FIRST_ROWS
        while True:
            open_rows = int((least < best.cost).sum())
            if not open_rows:
                break
            rows = least.topk(min(size, open_rows, chunk), largest=False).indices
            table = problem.rows(rows).mul_(-2).add_(enter)
            if groups is not None:
                table.masked_fill_(groups[rows, None] != groups, inf)
            bound[rows] = smallest = table.amin(1)
            total = smallest + leave[rows]
            row = int(total.argmin())
            if float(total[row]) < best.cost:
                best = Swap(int(rows[row]), int(table[row].argmin()), float(total[row]))
            least[rows] = inf
            size *= 2
        if best.revived < 0:
            return
        a, b, _ = best
        out, into = problem.rows(torch.tensor([a, b], device=x.device))
        change = into - out
        field += change
        x[a], x[b] = False, True
        yield best
        # What a partner's terms fell by at most, group by group; a itself is a new partner.
        partners = ~x
        partners[a] = False
        fall = torch.full_like(diagonal, inf).scatter_reduce_(
            0, members, torch.where(partners, 2 * change, inf), "amin"
        )
        bound += fall[members]
        fresh = (diagonal[a] + 2 * field[a]) - 2 * out
        bound = torch.where(members == members[a], torch.minimum(bound, fresh), bound)
        bound[b] = -inf


@solver("swap")
def _swap(problem: Problem, start: Tensor, groups: Tensor | None, restarts: int, generator: torch.Generator) -> Tensor:
    """Steepest-descent swaps: deterministic, monotone, and ends where no single swap helps."""

    def descend(x: Tensor) -> Tensor:
        for _ in steepest_swaps(problem, x, groups):
            pass
        return x

    return _best(problem, map(descend, _starts(start, groups, restarts, generator)))


@solver("local")
def _local(
    problem: Problem,
    start: Tensor,
    groups: Tensor | None,
    restarts: int,
    generator: torch.Generator,
    *,
    window: int = 10,
    misses: int = 20,
    passes: int = 100,
    epsilon: float = 0.0,
) -> Tensor:
    """Local search of the Combinatorial Brain Surgeon (CBS-S), for blocks too large for a table of swaps.

    Each pass ranks the pruned by what their revival gains, and the kept by what they cost beside the first of
    these. The pruned are taken in turn; each is swapped with the first partner at most `window` ranks away (or,
    with groups, among the first 2 · window + 1 of its group) that lowers the energy, given the swaps made so far.
    A pass ends after more than `misses` failures; the search ends with a pass without a swap. (The paper already
    stops when the first pair fails, which is not always the best pair.)

    Args:
        epsilon: the least improvement of a swap, in units of the mean absolute non-zero entry of Q.
    """
    least = max(epsilon * problem.scale() if epsilon else 0.0, problem.tolerance)
    diagonal, inf = problem.diagonal, math.inf

    def search(x: Tensor) -> Tensor:
        field = problem.field(x)
        count = int(x.sum())
        for _ in range(passes if 0 < count < problem.n else 0):
            order = torch.where(x, diagonal - 2 * field, inf).argsort(stable=True)[:count]
            beside = diagonal + 2 * field - 2 * problem.rows(order[:1])[0]
            partners = torch.where(x, inf, beside).argsort(stable=True)[: problem.n - count]
            free = torch.ones_like(partners, dtype=torch.bool)
            swaps = failures = 0
            for rank, a in enumerate(order):
                if groups is None:
                    low = max(0, rank - window)
                    places = low + free[low : rank + window + 1].nonzero()[:, 0]
                else:
                    places = (free & (groups[partners] == groups[a])).nonzero()[: 2 * window + 1, 0]
                near = partners[places]
                row = problem.rows(a[None])[0]
                cost = (diagonal[a] - 2 * field[a]) + diagonal[near] + 2 * field[near] - 2 * row[near]
                good = (cost < -least).nonzero()[:, 0]
                if not len(good):
                    failures += 1
                    if failures > misses:
                        break
                    continue
                b = near[good[0]]
                field += problem.rows(b[None])[0] - row
                x[a], x[b] = False, True
                free[places[good[0]]] = False
                swaps += 1
            if not swaps:
                break
        return x

    return _best(problem, map(search, _starts(start, groups, restarts, generator)))


@solver("anneal")
def _anneal(
    problem: Problem,
    start: Tensor,
    groups: Tensor | None,
    restarts: int,
    generator: torch.Generator,
    *,
    beta_start: float = 1e-3,
    beta_end: float = 100.0,
    growth: float = 1.1,
    sweeps: int = 1,
) -> Tensor:
    """Simulated annealing by swaps, on the CPU; all restarts advance together.

    A sweep visits every candidate once and proposes to swap it with a random one of the opposite state in its
    group. A rise ΔE is accepted with probability exp(−2 β ΔE / scale), where scale is the mean absolute non-zero
    entry of Q. Annealing stops early once a temperature changed no energy. The best state seen over all restarts
    is finished by steepest descent, since the last temperature is not zero.

    Args:
        beta_start, beta_end, growth: inverse temperatures, a geometric series that ends below `beta_end`.
        sweeps: per temperature.
    """
    scale = problem.scale()
    if scale == 0:
        return start
    n = problem.n
    labels = np.zeros(n, dtype=np.int64) if groups is None else groups.cpu().numpy()
    mask = start.cpu().numpy()
    # Every group is a segment of `order`, its ones first: a swap exchanges two entries of one segment.
    first = np.lexsort((~mask, labels))
    begin = np.searchsorted(labels[first], labels)
    end = np.searchsorted(labels[first], labels, side="right")
    split = begin + np.bincount(labels, weights=mask)[labels].astype(np.int64)
    order = np.tile(first, (restarts, 1))
    place = np.tile(np.argsort(first), (restarts, 1))
    movable = np.flatnonzero((begin < split) & (split < end)).tolist()

    state: _DenseState | _FactorState
    state = (_DenseState if problem.matrix is not None else _FactorState)(problem, start, restarts)
    lanes = np.arange(restarts)
    energy, lowest = np.zeros(restarts), np.zeros(restarts)
    best = np.tile(mask, (restarts, 1))
    moved = 1e-12 * scale
    beta = beta_start
    while beta < beta_end:
        changed = False
        for _ in range(sweeps):
            draws = torch.randint(1 << 31, (n, restarts), generator=generator).numpy()
            patience = torch.empty(n, restarts, dtype=torch.float64).exponential_(generator=generator)
            limits = (patience * (scale / (2 * beta))).numpy()
            for i in movable:
                here = place[:, i]
                one = here < split[i]
                low = np.where(one, split[i], begin[i])
                there = low + draws[i] % np.where(one, end[i] - split[i], split[i] - begin[i])
                j = order[lanes, there]
                sign = np.where(one, 1.0, -1.0)  # +1: i is revived and j pruned
                cost = state.cost(i, j, sign)
                taken = np.flatnonzero(cost <= limits[i])
                if not len(taken):
                    continue
                partner, spot, origin = j[taken], there[taken], here[taken]
                state.swap(taken, i, partner, sign[taken])
                order[taken, origin], order[taken, spot] = partner, i
                place[taken, i], place[taken, partner] = spot, origin
                energy[taken] += cost[taken]
                changed = changed or bool((np.abs(cost[taken]) > moved).any())
                for lane in taken[energy[taken] < lowest[taken] - moved]:
                    lowest[lane] = energy[lane]
                    best[lane] = place[lane] < split
        if not changed:
            break
        beta *= growth
    winner = torch.from_numpy(best[int(lowest.argmin())].copy()).to(start.device)
    for _ in steepest_swaps(problem, winner, groups):
        pass
    return winner


@solver("exact")
def _exact(
    problem: Problem,
    start: Tensor,
    groups: Tensor | None,
    restarts: int,
    generator: torch.Generator,
    *,
    limit: int = 2_000_000,
) -> Tensor:
    """Enumeration of every feasible mask, for n up to about 20.

    Raises:
        BillhookError: there are more than `limit` masks.
    """
    labels = torch.zeros_like(start, dtype=torch.int64) if groups is None else groups
    parts = [(labels == group).nonzero()[:, 0] for group in range(int(labels.max()) + 1)]
    counts = [int(start[part].sum()) for part in parts]
    total = math.prod(math.comb(len(part), count) for part, count in zip(parts, counts, strict=True))
    if total > limit:
        raise BillhookError(
            f"Enumeration would visit {total} masks: use solver 'swap' or 'anneal', or a smaller block."
        )
    choices = [list(combinations(part.tolist(), count)) for part, count in zip(parts, counts, strict=True)]
    masks = product(*choices)
    best, lowest = start, math.inf
    while batch := [list(chain.from_iterable(mask)) for mask in islice(masks, max(1, _ENTRIES // (4 * problem.n)))]:
        index = torch.tensor(batch, dtype=torch.int64, device=start.device)
        x = torch.zeros(len(batch), problem.n, dtype=torch.bool, device=start.device).scatter_(1, index, True)
        energy = problem.energy(x)
        at = int(energy.argmin())
        if float(energy[at]) < lowest:
            best, lowest = x[at], float(energy[at])
    return best


class _DenseState:
    """Fields of all restarts, f = Qx [restarts, n]: a proposal costs O(1), an accepted swap O(n)."""

    def __init__(self, problem: Problem, start: Tensor, restarts: int) -> None:
        assert problem.matrix is not None
        self.matrix: NDArray[np.float64] = problem.matrix.cpu().numpy()
        self.diagonal: NDArray[np.float64] = problem.diagonal.cpu().numpy()
        self.field: NDArray[np.float64] = np.tile(problem.field(start).cpu().numpy(), (restarts, 1))
        self.lanes = np.arange(restarts)

    def cost(self, i: int, j: NDArray[np.int64], sign: NDArray[np.float64]) -> NDArray[np.float64]:
        """Change of energy [restarts] of swapping i with j; sign +1 where i is revived, −1 where it is pruned."""
        terms = self.diagonal[i] + self.diagonal[j] - 2 * self.matrix[i, j]
        result: NDArray[np.float64] = terms + 2 * sign * (self.field[self.lanes, j] - self.field[:, i])
        return result

    def swap(self, lanes: NDArray[np.int64], i: int, j: NDArray[np.int64], sign: NDArray[np.float64]) -> None:
        """Carry the swaps out in the restarts `lanes`."""
        self.field[lanes] += sign[:, None] * (self.matrix[j] - self.matrix[i])


class _FactorState:
    """Projections of all restarts, u = Fx [restarts, S]: a proposal and an accepted swap cost O(S)."""

    def __init__(self, problem: Problem, start: Tensor, restarts: int) -> None:
        assert problem.factor is not None
        assert problem.linear is not None
        self.columns: NDArray[np.float64] = problem.factor.T.contiguous().cpu().numpy()
        self.linear: NDArray[np.float64] = problem.linear.cpu().numpy()
        self.projection: NDArray[np.float64] = np.tile(start.cpu().numpy() @ self.columns, (restarts, 1))

    def cost(self, i: int, j: NDArray[np.int64], sign: NDArray[np.float64]) -> NDArray[np.float64]:
        """As above: |u ± v|² − |u|² ± (l_j − l_i) with v = F_j − F_i."""
        v = self.columns[j] - self.columns[i]
        first_order = 2 * np.einsum("rs,rs->r", self.projection, v) + self.linear[j] - self.linear[i]
        result: NDArray[np.float64] = sign * first_order + np.einsum("rs,rs->r", v, v)
        return result

    def swap(self, lanes: NDArray[np.int64], i: int, j: NDArray[np.int64], sign: NDArray[np.float64]) -> None:
        """As above."""
        self.projection[lanes] += sign[:, None] * (self.columns[j] - self.columns[i])


def _rows_at_once(n: int) -> int:
    return max(1, _ENTRIES // n)


def _counts(x: Tensor, groups: Tensor | None) -> Tensor:
    """Ones in each group."""
    return x.sum()[None] if groups is None else torch.bincount(groups, weights=x.double())


def _starts(start: Tensor, groups: Tensor | None, restarts: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The start, then uniformly random masks with the same count in every group."""
    yield start.clone()
    for _ in range(restarts - 1):
        shuffled = torch.randperm(len(start), generator=generator).to(start.device)
        ordered = torch.arange(len(start), device=start.device)
        if groups is not None:
            shuffled = shuffled[groups[shuffled].argsort(stable=True)]
            ordered = groups.argsort(stable=True)
        x = torch.empty_like(start)
        x[shuffled] = start[ordered]
        yield x


def _best(problem: Problem, found: Iterator[Tensor]) -> Tensor:
    """The mask of lowest energy; the earliest of equals."""
    return min(found, key=lambda x: float(problem.energy(x)))
