"""Padding is counted nowhere: padded sequences calibrate like the same sequences one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import billhook as bh
from billhook.calibrate.fisher import next_token_losses
from billhook.calibrate.gram import Gram
from billhook.calibrate.influence import block_influence
from billhook.calibrate.sensitivity import task_loss
from billhook.calibrate.statistics import ColumnNorm, Covariance, SequenceMoments, Statistic, TokenSum
from billhook.calibrate.walk import Walk
from billhook.methods.base import METHODS
from billhook.surgery.slim import slim_
from tiny import TEXT_FAMILIES, batches_for, build, weights_of

LENGTHS = (24, 17)


def padded(family: str) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """One batch of two sequences, padded on the right; and the two, one by one."""
    ids = batches_for(family, count=1)[0][:2, : LENGTHS[0]].clone()
    assert ids.shape == (2, LENGTHS[0])
    mask = torch.ones_like(ids)
    mask[1, LENGTHS[1] :] = 0
    alone = [ids[:1].clone(), ids[1:, : LENGTHS[1]].clone()]
    ids[1, LENGTHS[1] :] = 3
    return [{"input_ids": ids, "attention_mask": mask}], alone


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [torch.as_tensor(value, dtype=torch.float64) for value in vars(result).values()]


# OPT's MLP gets sequences in a row, which are told apart only where there is padding
PAIRS = [
    (statistic, family)
    for statistic in (ColumnNorm, TokenSum, SequenceMoments, Gram)
    for family in TEXT_FAMILIES
    if (statistic, family) != (SequenceMoments, "opt")
]


@pytest.mark.parametrize(("statistic", "family"), PAIRS)
def test_statistics_leave_padding_out(statistic: type[Statistic[Any]], family: str) -> None:
    found = []
    for batches in padded(family):
        rows = []
        for block in Walk(build(family), batches, precision="highest"):
            results = block.collect(statistic)
            rows.append([results[site] for site in block.sites])
        found.append([result.matrix if isinstance(result, Gram) else result for row in rows for result in row])
    for one, other in zip(*found, strict=True):
        for a, b in zip(flat(one), flat(other), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_stream_is_seen_without_padding() -> None:
    found: list[list[Tensor]] = []
    for batches in padded("llama"):
        model = build("llama")
        slim_(model)
        walk = Walk(model, batches, precision="highest")
        found.append([walk.entering(Covariance)])
        for block in walk:
            found[-1] += [block.between(Covariance), block.leaving(Covariance)]
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_influence_and_losses_leave_padding_out() -> None:
    together, alone = padded("llama")
    model = build("llama")
    one, two = (block_influence(Walk(model, batches, precision="highest")) for batches in (together, alone))
    assert one == pytest.approx(two, rel=1e-4)
    with torch.no_grad():
        got = float(task_loss(model(**together[0]), together[0]))
        each = [float(task_loss(model(ids), ids)) for ids in alone]
        assert next_token_losses(model, together[0]).tolist() == pytest.approx(each, rel=1e-5)
    targets = [length - 1 for length in LENGTHS]
    assert got == pytest.approx(sum(e * n for e, n in zip(each, targets, strict=True)) / sum(targets), rel=1e-5)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda(refine=dsnot)", "fasp", "magnitude+perp"])
def test_methods_give_the_same_model(method: str) -> None:
    """PERP too, whose loss is over tokens; with both sequences in one batch it has to see them as one step."""
    models = []
    together, alone = padded("llama")
    for batches in (together, alone):
        model = build("llama")
        first, *rest = method.split("+")
        options: dict[str, Any] = {"training_steps": 0} if rest else {}
        steps = [METHODS.parse(first, sparsity=0.5), *(METHODS.parse(one, **options) for one in rest)]
        bh.prune(model, steps, batches, precision="highest")
        models.append(model)
    one, two = (weights_of(model) for model in models)
    for key, value in one.items():
        same = torch.isclose(value, two[key], rtol=1e-3, atol=1e-4).float().mean()
        assert same > 0.98, key  # near-ties may fall the other way


def test_what_stands_under_padding_does_not_matter() -> None:
    """PERP's targets and losses are over tokens, whatever fills the rest."""
    results = []
    for filler in (3, 9):
        (batch,), _ = padded("llama")
        batch["input_ids"][1, LENGTHS[1] :] = filler
        model = build("llama")
        bh.prune(model, [bh.Magnitude(sparsity=0.5), bh.PERP(training_steps=3, rank=2)], [batch], precision="highest")
        results.append(weights_of(model))
    for key, value in results[0].items():
        assert torch.allclose(value, results[1][key], atol=1e-6), key
