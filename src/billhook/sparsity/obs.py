"""Second-order removal of weights (optimal brain surgeon) for a layer's least-squares problem.

Throughout, the loss of replacing W [out, in] by Ŵ is tr((Ŵ − W) H (Ŵ − W)ᵀ) with the Gram matrix H [in, in] of
the layer's input; rows of W are independent and share H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from billhook.sparsity.patterns import NM, Scope
from billhook.sparsity.select import budget, keep_lanes, keep_largest

_INNER = 32


def sweep(
    weight: Tensor,
    upper: Tensor,
    *,
    sparsity: float = 0.0,
    pattern: NM | None = None,
    scope: Scope = "layer",
    keep: Tensor | None = None,
    dead: Tensor | None = None,
    block_size: int = 128,
    matrices: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """SparseGPT's sweep (Frantar & Alistarh 2023, algorithm 1): prune column by column, repair to the right.

    Columns are taken from left to right in blocks; each removed weight's error is compensated by the columns to
    its right through U. The mask of a block is chosen when the sweep reaches it, by w² / U_ii² on the weights
    updated so far; or it is given by `keep`.

    Args:
        weight: [out, in], float32 or float64. Not modified.
        upper: U of `inverse_cholesky`, [in, in], same dtype.
        sparsity: share removed in every column block ("layer": over all rows of the block; "row": of each row),
            when neither `pattern` nor `keep` is given. Counts are exact over the whole matrix.
        pattern: N:M; its groups must not straddle column blocks, so block_size is rounded to a multiple of M.
        scope: as above.
        keep: a fixed bool mask [out, in]; the sweep is then a pure weight update for it.
        dead: bool [in], channels whose input is always zero: they are pruned first and disturb nothing.
        block_size: columns per block.
        matrices: row counts of several matrices that share the input and are swept at once, stacked in `weight`;
            in scope "layer" each has a budget of its own. The result is that of one sweep per matrix.

    Returns:
        (Ŵ, mask): the new weight with exact zeros, and the bool mask [out, in] of what was kept.
    """
    rows, columns = weight.shape
    # Columns are the unit of work: transposed, each is one contiguous run of memory.
    w = weight.T.clone(memory_format=torch.contiguous_format)
    mask = torch.ones(columns, rows, dtype=torch.bool, device=weight.device)
    if pattern is not None:
        block_size = max(1, block_size // pattern.m) * pattern.m
    diagonal = upper.diagonal()
    worth = diagonal.reciprocal()  # a score is (w · worth)²
    if dead is not None:
        worth[dead] = 0.0
    heights = list(matrices or [rows])
    pruned = [0] * len(heights)

    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        width = end - start
        u = upper[start:end, start:] / diagonal[start:end, None]  # errors stay in units of weights
        block = w[start:end]  # [width, rows], a view
        if keep is not None:
            mask[start:end] = keep[:, start:end].T
        elif pattern is None:
            score = (block * worth[start:end, None]).square_()
            if scope == "row":
                share = budget(end, sparsity) - budget(start, sparsity)
                mask[start:end] = keep_largest(score.T, share).T
            else:
                top = 0
                for m, height in enumerate(heights):
                    share = budget(height * end, sparsity) - pruned[m]
                    chosen = keep_largest(score[:, top : top + height].T.reshape(1, -1), share)
                    mask[start:end, top : top + height] = chosen.view(height, width).T
                    pruned[m] += share
                    top += height
        drop = (~mask[start:end]).to(w.dtype)
        removed = torch.empty_like(block)
        # Two levels of blocking: rank-one updates touch _INNER columns only, the rest follows as one product.
        inner_size = _INNER if pattern is None else max(1, _INNER // pattern.m) * pattern.m
        for left in range(0, width, inner_size):
            right = min(left + inner_size, width)
            for i in range(left, right):
                if pattern is not None and keep is None and i % pattern.m == 0:
                    group = slice(start + i, start + i + pattern.m)
                    score = (w[group] * worth[group, None]).square_()
                    mask[group] = keep_lanes(score, pattern.n)
                    torch.logical_not(mask[group], out=drop[i : i + pattern.m])
                torch.mul(block[i], drop[i], out=removed[i])
                if i + 1 < right:
                    block[i + 1 : right].addr_(u[i, i + 1 : right], removed[i], alpha=-1)
            if right < width:
                block[right:].addmm_(u[left:right, right:width].T, removed[left:right], alpha=-1)
        if end < columns:
            w[end:].addmm_(u[:, width:].T, removed, alpha=-1)
    kept = mask.T.contiguous()
    return w.T.masked_fill(~kept, 0.0), kept


def joint_least_squares(weight: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
    """The best weights for a given mask: least squares on the kept inputs of each row.

    Row by row, ŵ_S = w_S + H_SS⁻¹ H_SQ w_Q for kept S and removed Q: the optimum that every other update with
    the same mask is measured against. O(out · in³): for tests and small layers.

    Args:
        weight: [out, in]; gram: [in, in], positive definite; keep: bool [out, in]. float64 recommended.
    """
    result = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        kept = keep[row]
        if bool(kept.any()):
            system = gram[kept][:, kept]
            result[row, kept] = torch.linalg.solve(system, gram[kept] @ weight[row])
    return result


def quadratic_loss(weight: Tensor, new: Tensor, gram: Tensor) -> Tensor:
    """tr((Ŵ − W) H (Ŵ − W)ᵀ): the squared error of the layer's output summed over the tokens of H."""
    difference = new - weight
    return ((difference @ gram) * difference).sum()
