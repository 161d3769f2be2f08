"""Quality over a knob that removes more and more of a model: how much goes for free, and where the curve breaks.

Essential sparsity (Jaiswal, Liu, Chen & Wang, "The Emergence of Essential Sparsity in Large Pre-trained Models",
NeurIPS 2023, arXiv:2306.03805) is the largest sparsity whose quality is within eps of the dense model's, while a
small further portion rho loses more. The paper reads it off the plot; the procedure here is ours: evaluate a
grid, smooth it to a non-increasing curve, bisect around the crossing. Two knees say whether the curve breaks
there or fades: a hinge fit, and the point farthest from the chord (Satopää et al. 2011, "Kneedle").

The knob is mostly the sparsity, but heads, layers or ranks removed do as well: 0 is the dense model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field

from billhook.errors import BillhookError

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_TAIL = 0.25  # share of the way to chance level beyond which a point says nothing about the knee
_DIGITS = 9  # knob values are rounded to these, so that a value read back from a file is the same key

_Array = NDArray[np.float64]
_P = TypeVar("_P", bound="Point")


class _Result(BaseModel):
    # a cliff has an infinite sharpness, and JSON has no word for that
    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")


class Point(_Result):
    """The quality measured at one value of the knob."""

    sparsity: float
    quality: float  # mean over the seeds; NaN or infinite where a seed's was
    se: float | None = None  # standard error of that mean; None for a single seed
    values: list[float] = Field(default_factory=list)  # of seed 0, 1, ...
    fitted: float | None = None  # the non-increasing fit of the curve here

    @classmethod
    def of(cls: type[_P], sparsity: float, values: Sequence[float], **fields: Any) -> _P:
        """A point from the qualities of its seeds; `fields` are those of a subclass."""
        count = len(values)
        if not all(math.isfinite(value) for value in values):
            return cls(sparsity=sparsity, quality=sum(values) / count, values=list(values), **fields)
        mean = math.fsum(values) / count
        se = None
        if count > 1:
            se = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
        return cls(sparsity=sparsity, quality=mean, se=se, values=list(values), **fields)


class Curve(_Result):
    """A measured curve, its essential sparsity and its knees."""

    knob: str = "sparsity"
    eps: float  # allowed drop as asked for: units of the quality ("points"), or percent of |dense| ("relative")
    eps_mode: Literal["points", "relative"] = "points"
    drop: float  # allowed drop in units of the quality
    line: float  # dense quality − drop, less a billionth of it: an exact tie is within
    chance: float  # quality of guessing
    rho: float
    seeds: int
    points: list[Point]  # all that were evaluated, in ascending order; the first is the dense model
    s_eps: float  # the essential sparsity; the last point where the line is never crossed
    s_above: float | None = None  # the evaluated point next to it, which is below the line
    crossings: list[tuple[float, float]] = Field(default_factory=list)  # every fall of the raw means through the line
    flag: Literal["sharp", "gradual", "no crossing"]
    s_hi: float | None = None  # the knees are of the points up to here
    tau_hinge: float | None = None
    tau_chord: float | None = None
    sharpness: float | None = None  # slope after the hinge / slope before it; infinite for a cliff
    cliff: bool = False  # the curve falls between two points closer than rho
    slope_before: float | None = None  # of the hinge fit
    slope_after: float | None = None
    sse_hinge: float | None = None
    sse_line: float | None = None  # of one straight line
    p_value: float | None = None  # F-test of the hinge against that line; None below six points
    se: float | None = None  # largest standard error at the crossing and of the dense model
    stopped_early: bool = False  # the rest of the grid was not evaluated
    evaluations: int  # calls of `evaluate` in this run
    reused: int = 0  # qualities taken from `known` instead
    warnings: list[str] = Field(default_factory=list)

    @property
    def dense(self) -> float:
        """Quality of the dense model."""
        return self.points[0].quality


# The pieces


def isotonic(quality: ArrayLike, weights: ArrayLike | None = None) -> _Array:
    """The non-increasing sequence nearest to `quality` in (weighted) least squares: pool adjacent violators.

    Args:
        quality: [n], finite, in the order of the knob.
        weights: [n], positive; 1 each if None.

    Returns:
        float64 [n].
    """
    values = np.asarray(quality, dtype=np.float64)
    pools: list[tuple[float, float, int]] = []  # mean, weight, count
    for value, weight in zip(values, np.ones_like(values) if weights is None else np.asarray(weights), strict=True):
        pools.append((float(value), float(weight), 1))
        while len(pools) > 1 and pools[-1][0] > pools[-2][0]:
            (second, v, m), (first, w, n) = pools.pop(), pools.pop()
            pools.append(((first * w + second * v) / (w + v), w + v, n + m))
    return np.repeat([mean for mean, _, _ in pools], [count for _, _, count in pools])


@dataclass(frozen=True)
class Hinge:
    """Two straight lines that meet at `tau`, the second one steeper downwards."""

    tau: float
    before: float  # slope up to tau
    after: float
    sse: float  # sum of squared errors
    sse_line: float  # that of one straight line through the same points
    count: int  # of points

    @property
    def p_value(self) -> float | None:
        """P-value of the F-test against one line: two more parameters. None below six points."""
        if self.count < 6:
            return None
        if self.sse <= 0:
            return 0.0
        # For two degrees of freedom above the line the F distribution has a closed tail.
        return float((self.sse / self.sse_line) ** ((self.count - 4) / 2))

    def sharpness(self, drop: float) -> float:
        """Slope after / slope before, the latter at least as steep as losing `drop` from 0 to tau.

        A rise before tau counts as flat.
        """
        flat = drop / self.tau if self.tau > 0 else math.inf
        return max(0.0, -self.after) / max(-self.before, flat)

    def sharp(self, drop: float) -> bool:
        """Whether the curve breaks: three times steeper, half the error of a line, and not by accident."""
        p_value = self.p_value
        explained = self.sse <= 0.5 * self.sse_line and (p_value is None or p_value < 0.05)
        return explained and self.sharpness(drop) >= 3


def hinge(sparsity: ArrayLike, quality: ArrayLike, lattice: float = 0.005) -> Hinge | None:
    """The least-squares fit q = a + b·s + c·max(0, s − tau) with c <= 0, tau searched on a lattice.

    A tau needs three points at or left of it, and two right of it.

    Args:
        sparsity: [n], ascending; quality: [n], finite.
        lattice: spacing of the tau that are tried.

    Returns:
        the fit; None where there are too few points, no bend downwards, or one line fits exactly.
    """
    x, y = np.asarray(sparsity, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    if len(x) < 5:
        return None
    line = np.stack([np.ones_like(x), x], axis=1)
    sse_line = _least_squares(line, y)[1]
    if sse_line <= len(y) * (1e-9 * float(np.abs(y).max())) ** 2:  # rounding, in which there is no bend to find
        return None
    best: Hinge | None = None
    for i in range(math.ceil(x[2] / lattice - 1e-6), math.floor(x[-2] / lattice + 1e-6) + 1):
        tau = round(i * lattice, _DIGITS)
        left = np.count_nonzero(x <= tau + 1e-9)
        if left < 3 or len(x) - left < 2:
            continue
        (_, slope, bend), sse = _least_squares(np.column_stack([line, np.maximum(0, x - tau)]), y)
        if bend < 0 and sse < (sse_line if best is None else best.sse):
            best = Hinge(tau, float(slope), float(slope + bend), sse, sse_line, len(x))
    return best


def _least_squares(design: _Array, y: _Array) -> tuple[_Array, float]:
    """(coefficients, sum of squared errors)."""
    coefficients: _Array = np.linalg.lstsq(design, y, rcond=None)[0].astype(np.float64, copy=False)
    residual = y - design @ coefficients
    return coefficients, float(residual @ residual)


def chord(sparsity: ArrayLike, quality: ArrayLike) -> float | None:
    """The point farthest above the chord from the first point to the last (Kneedle); it is one of the points given.

    Args:
        sparsity: [n], ascending from 0; quality: [n], finite.

    Returns:
        its sparsity; None where no point is above the chord.
    """
    x, y = np.asarray(sparsity, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    width, height = x[-1], y.max() - y.min()
    if width <= 0 or height <= 0:
        return None
    above = x / width + (y - y.min()) / height - 1
    return float(x[above.argmax()]) if above.max() > 1e-9 else None


# The search


def essential_sparsity(
    evaluate: Callable[[float, int], float],
    *,
    eps: float,
    eps_mode: Literal["points", "relative"] = "points",
    grid: Sequence[float] = GRID,
    rho: float = 0.01,
    chance: float | None = None,
    seeds: int = 1,
    step: float | None = None,
    knob: str = "sparsity",
    known: Mapping[tuple[float, int], float] | None = None,
    on_point: Callable[[float, int, float], None] | None = None,
) -> Curve:
    """Measure a curve of quality over sparsity and find where it leaves the free range.

    1. The grid is evaluated upwards, until two consecutive points lost more than max(10·drop, a quarter of the way
       to chance).
    2. The means are smoothed to a non-increasing curve; weights 1/se² where there are several seeds.
    3. The bracket is the last grid point not below dense − drop and the next one; it is bisected down to rho.
    4. The knees are those of the points up to s_hi, the last one that lost at most a quarter of the way to chance
       (or twice the drop, if that is more): the flat bottom of an accuracy and the tail of a likelihood would pull
       them to the right. With fewer than two points between s_eps and s_hi the gap behind s_hi is bisected too;
       where it closes to rho without giving them, the curve is a cliff.

    The whole is deterministic: resumed with what is known, it goes the same way.

    Args:
        evaluate: (sparsity, seed) -> quality; higher is better. For a perplexity give −NLL per token. NaN and
            infinite qualities stand for a broken model.
        eps: allowed drop: in units of the quality ("points": 1.0 for an accuracy in percent), or in percent of the
            absolute dense quality ("relative": 1.0 for one percent of the NLL).
        eps_mode: see eps.
        grid: values of the knob; 0, the dense model, is added when missing.
        rho: resolution of the result.
        chance: quality of guessing; 0 for a positive quality if None. For −NLL it is needed: −ln(vocabulary size).
        seeds: evaluations per point, with seed 0, 1, ...
        step: smallest step of a knob that is not continuous, 1 for heads or layers.
        knob: its name, for the record.
        known: qualities by (sparsity, seed) that were measured before and are not measured again.
        on_point: called with (sparsity, seed, quality) after every call of `evaluate`, to save it.

    Raises:
        BillhookError: an argument is out of range, the dense quality is not finite or not above chance, or chance
            is missing.
    """
    values = _grid(grid, knob)
    if not (math.isfinite(eps) and eps > 0):
        raise BillhookError(f"eps is {eps}, but the allowed drop must be above 0: use 1.0 for one point or percent.")
    if not (math.isfinite(rho) and rho >= 10**-_DIGITS):
        raise BillhookError(f"rho is {rho}, but the resolution must be above 0: use 0.01.")
    if step is not None and not step > 0:
        raise BillhookError(f"step is {step}, but the knob's smallest step must be above 0.")
    if seeds < 1:
        raise BillhookError(f"seeds is {seeds}, but every point needs one evaluation or more.")
    samples = _Samples(evaluate, seeds, known or {}, on_point)

    dense = samples.at(0.0).quality
    if not math.isfinite(dense):
        raise BillhookError(f"The quality of the dense model is {dense}: there is no curve to measure.")
    if chance is None:
        if dense <= 0:
            raise BillhookError(
                f"The quality of the dense model is {dense:.6g} and chance is not given: pass the quality of guessing, "
                "which is -ln(vocabulary size) for the negative NLL of a language model."
            )
        chance = 0.0
    span = dense - chance
    if not span > 0:
        raise BillhookError(f"The quality of the dense model, {dense:.6g}, is not above chance, {chance:.6g}.")
    drop = eps if eps_mode == "points" else eps / 100 * abs(dense)
    if drop >= span:
        raise BillhookError(
            f"The allowed drop of {drop:.6g} reaches chance, which is {span:.6g} below the dense model: use a smaller "
            "eps (0.01 for one point of a quality between 0 and 1)."
        )
    line = dense - drop * (1 + 1e-9)  # pooling equal values rounds, and must not put a tie below
    samples.floor = chance

    # 1, 2: the grid and its fit
    lost, stopped = 0, False
    for sparsity in values[1:]:
        far = not dense - samples.at(sparsity).quality <= max(10 * drop, _TAIL * span)  # NaN is far
        lost = lost + 1 if far else 0
        if lost == 2:
            stopped = sparsity != values[-1]
            break
    points, fit = samples.curve()
    last_kept = int(np.flatnonzero(fit >= line)[-1])  # the fit starts at or above the dense quality
    result: dict[str, Any] = {"s_eps": points[last_kept].sparsity, "flag": "no crossing"}
    checked = {0.0, points[last_kept].sparsity}

    # 3, 4: the crossing and the knees
    if last_kept + 1 < len(points):
        low, high = points[last_kept].sparsity, points[last_kept + 1].sparsity
        checked.add(high)
        while (middle := _between(low, high, rho, step)) is not None:
            # The ends of a bracket are the ends of two pools, so that the raw mean decides as a new fit would
            low, high = (middle, high) if samples.at(middle).quality >= line else (low, middle)
        checked |= {low, high}
        result |= {"s_eps": low, "s_above": high}
        result |= _knees(samples, low, drop, max(_TAIL * span, 2 * drop), rho, step, values[-1])

    points, fit = samples.curve()
    errors = [point.se for point in points if point.sparsity in checked and point.se is not None]
    curve = Curve(
        knob=knob,
        eps=eps,
        eps_mode=eps_mode,
        drop=drop,
        line=line,
        chance=chance,
        rho=rho,
        seeds=seeds,
        points=[point.model_copy(update={"fitted": float(q)}) for point, q in zip(points, fit, strict=True)],
        crossings=[
            (a.sparsity, b.sparsity) for a, b in pairwise(points) if a.quality >= line and not b.quality >= line
        ],
        se=max(errors, default=None),
        stopped_early=stopped,
        evaluations=samples.evaluations,
        reused=samples.reused,
        **result,
    )
    curve.warnings = _warnings(curve)
    return curve


def _knees(
    samples: _Samples, s_eps: float, drop: float, most: float, rho: float, step: float | None, last: float
) -> dict[str, Any]:
    """s_hi, the knees, the sharpness and the flag, as fields of `Curve`; `most` is the drop allowed up to s_hi."""
    dense = samples.at(0.0).quality
    while True:
        points, fit = samples.curve()
        near = int(np.flatnonzero(dense - fit <= most)[-1])
        s_hi = points[near].sparsity
        if sum(s_eps < point.sparsity <= s_hi for point in points) >= 2 or near + 1 == len(points):
            break
        middle = _between(s_hi, points[near + 1].sparsity, rho, step)
        if middle is None:
            cliff = {"cliff": True, "tau_hinge": s_eps, "tau_chord": s_eps, "sharpness": math.inf, "flag": "sharp"}
            return {"s_hi": s_hi, **cliff}
        samples.at(middle)
    x = [point.sparsity for point in points[: near + 1]]
    y = samples.finite(points[: near + 1])
    result: dict[str, Any] = {"s_hi": s_hi, "tau_chord": chord(x, y), "flag": "gradual"}
    bend = hinge(x, y, 0.005 * max(1.0, last))
    if bend is not None:
        result |= {
            "tau_hinge": bend.tau,
            "sharpness": bend.sharpness(drop),
            "slope_before": bend.before,
            "slope_after": bend.after,
            "sse_hinge": bend.sse,
            "sse_line": bend.sse_line,
            "p_value": bend.p_value,
            "flag": "sharp" if bend.sharp(drop) else "gradual",
        }
    return result


class _Samples:
    """What was evaluated so far."""

    def __init__(
        self,
        evaluate: Callable[[float, int], float],
        seeds: int,
        known: Mapping[tuple[float, int], float],
        on_point: Callable[[float, int, float], None] | None,
    ) -> None:
        self.evaluate, self.seeds, self.on_point = evaluate, seeds, on_point
        self.known = {(round(sparsity, _DIGITS), seed): value for (sparsity, seed), value in known.items()}
        self.points: dict[float, Point] = {}
        self.floor = 0.0  # the quality that a broken model counts as
        self.evaluations = self.reused = 0

    def at(self, sparsity: float) -> Point:
        """The point at `sparsity`, evaluated unless it is there."""
        if sparsity not in self.points:
            self.points[sparsity] = Point.of(sparsity, [self._value(sparsity, seed) for seed in range(self.seeds)])
        return self.points[sparsity]

    def _value(self, sparsity: float, seed: int) -> float:
        if (sparsity, seed) in self.known:
            self.reused += 1
            return float(self.known[sparsity, seed])
        value = float(self.evaluate(sparsity, seed))
        self.evaluations += 1
        if self.on_point is not None:
            self.on_point(sparsity, seed, value)
        return value

    def finite(self, points: Sequence[Point]) -> _Array:
        """The means, float64 [n]; those that are not finite are put at chance, or at the lowest if that is lower."""
        means = np.array([point.quality for point in points])
        good = np.isfinite(means)
        return np.where(good, means, min(self.floor, float(means[good].min(initial=self.floor))))

    def curve(self) -> tuple[list[Point], _Array]:
        """The points in ascending order and their non-increasing fit."""
        points = [self.points[sparsity] for sparsity in sorted(self.points)]
        return points, isotonic(self.finite(points), _weights(points))


def _weights(points: Sequence[Point]) -> _Array | None:
    """1/se² where every point has one."""
    errors = np.array([point.se for point in points if point.se is not None])
    if len(errors) < len(points) or float(np.median(errors)) == 0:
        return None
    # A standard error from a few seeds is itself uncertain: one that came out tiny must not outweigh all others
    weights: _Array = np.maximum(errors, np.median(errors) / 2) ** -2.0
    return weights


def _grid(grid: Sequence[float], knob: str) -> list[float]:
    values = sorted({round(float(value), _DIGITS) for value in (0.0, *grid)})
    if len(values) < 2 or not all(math.isfinite(value) for value in values) or values[0] < 0:
        raise BillhookError(f"The grid {list(grid)} needs a finite value above 0, and none below it.")
    if knob == "sparsity" and values[-1] > 1:
        raise BillhookError(f"The grid has a sparsity of {values[-1]:g}: sparsities are fractions between 0 and 1.")
    return values


def _between(low: float, high: float, rho: float, step: float | None) -> float | None:
    """The middle, or None where the two are closer than rho or no step lies between them."""
    if high - low <= rho * (1 + 1e-9):
        return None
    middle = (low + high) / 2
    if step is not None:
        middle = round(middle / step) * step
    middle = round(float(middle), _DIGITS)
    return middle if low < middle < high else None


def _warnings(curve: Curve) -> list[str]:
    texts = []
    if curve.flag == "no crossing":
        texts.append(
            f"No crossing: the quality stays within {curve.drop:.4g} of the dense model up to a {curve.knob} of "
            f"{curve.s_eps:.4g}, the end of the grid."
        )
    elif curve.s_eps == 0:
        texts.append(f"A {curve.knob} of {curve.s_above:.4g} already loses more than {curve.drop:.4g}.")
    if curve.se is not None and curve.se > curve.drop / 2:
        texts.append(
            f"The standard error at the crossing, {curve.se:.4g}, is more than half of the allowed drop of "
            f"{curve.drop:.4g}: average more seeds, or evaluate on more data."
        )
    if len(curve.crossings) > 1:
        texts.append(
            f"The measured curve falls through the line {len(curve.crossings)} times; the essential {curve.knob} is "
            "that of its non-increasing fit."
        )
    broken = [f"{point.sparsity:.4g}" for point in curve.points if not math.isfinite(point.quality)]
    if broken:
        texts.append(f"The quality is not finite at a {curve.knob} of {', '.join(broken)}; it counts as chance there.")
    return texts
