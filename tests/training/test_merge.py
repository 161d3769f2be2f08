"""Averages of networks, against their definition."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import nn

from billhook.errors import BillhookError
from billhook.training.merge import greedy_soup, merge_state_dicts


def states(count: int = 3, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "w": torch.randn(5, 4, generator=generator).to(dtype),
            "b": torch.randn(4, generator=generator).to(dtype),
            "count": torch.tensor(7 + j),
        }
        for j in range(count)
    ]


def test_the_average_is_the_average() -> None:
    given = states()
    merged = merge_state_dicts(given, [0.2, 0.3, 0.5])
    exact = sum(s * given[j]["w"].double() for j, s in enumerate((0.2, 0.3, 0.5)))
    assert torch.equal(merged["w"], exact.float())  # type: ignore[union-attr]
    uniform = merge_state_dicts(given)
    assert torch.allclose(uniform["b"], torch.stack([s["b"] for s in given]).mean(0), atol=1e-7)
    assert torch.equal(merged["count"], torch.tensor(7))
    assert merged["count"] is not given[0]["count"]


def test_one_or_equal_networks_stay() -> None:
    given = states()
    for result in (merge_state_dicts(given[:1]), merge_state_dicts(given, [1.0, 0.0, 0.0])):
        assert all(torch.equal(result[n], given[0][n]) for n in given[0])
    equal = merge_state_dicts([given[0]] * 3)
    assert all(torch.allclose(equal[n].double(), given[0][n].double(), atol=1e-7) for n in equal)


def test_order_does_not_matter() -> None:
    given, shares = states(), [0.2, 0.3, 0.5]
    for weights in (None, shares):
        first = merge_state_dicts(given, weights)
        for order in permutations(range(3)):
            moved = merge_state_dicts([given[j] for j in order], weights and [shares[j] for j in order])
            assert all(torch.allclose(moved[n], first[n], atol=1e-6) for n in ("w", "b"))


@pytest.mark.parametrize("shares", [[0.0, 1.0], [1.0, 0.0]])
def test_a_network_of_no_share_has_no_say(shares: list[float]) -> None:
    good, bad = {"w": torch.ones(3)}, {"w": torch.full((3,), float("nan"))}
    states = [good, bad] if shares[0] else [bad, good]
    assert torch.equal(merge_state_dicts(states, shares)["w"], torch.ones(3))


def test_low_precision_is_averaged_in_high() -> None:
    given = states(4, torch.bfloat16)
    merged = merge_state_dicts(given)["w"]
    exact = torch.stack([s["w"].double() for s in given]).mean(0)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.to(torch.bfloat16))


def test_absent_weights_are_zero_even_if_they_drifted() -> None:
    given = states()
    mask = {"w": torch.rand(5, 4, generator=torch.Generator().manual_seed(5)) > 0.5}
    merged = merge_state_dicts(given, masks=[mask] * 3)
    assert not bool(merged["w"][~mask["w"]].any())
    assert torch.equal(merged["w"][mask["w"]], merge_state_dicts(given)["w"][mask["w"]])


def test_a_linear_soup_answers_like_the_mean_of_answers() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 3) for _ in range(4)]
    soup = nn.Linear(6, 3)
    soup.load_state_dict(merge_state_dicts([layer.state_dict() for layer in layers]))
    x = torch.randn(10, 6)
    assert torch.allclose(soup(x), torch.stack([layer(x) for layer in layers]).mean(0), atol=1e-5)


def test_what_is_no_average_is_refused() -> None:
    given = states()
    mask = {"w": torch.ones(5, 4, dtype=torch.bool)}
    with pytest.raises(BillhookError, match=r"networks 0 and 2: the masks of w differ"):
        merge_state_dicts(given, masks=[mask, mask, {"w": ~mask["w"]}])
    with pytest.raises(BillhookError, match="the masks of b differ"):
        merge_state_dicts(given[:2], masks=[mask, {**mask, "b": torch.ones(4, dtype=torch.bool)}])
    for weights in ([0.5, 0.5, 0.5], [0.5, 0.5], [1.5, -0.5, 0.0]):
        with pytest.raises(BillhookError, match="no average"):
            merge_state_dicts(given, weights)
    with pytest.raises(BillhookError, match="at least one"):
        merge_state_dicts([])
    with pytest.raises(BillhookError, match="b is in one of them only"):
        merge_state_dicts([given[0], {"w": given[1]["w"], "count": given[1]["count"]}])
    with pytest.raises(BillhookError, match=r"w has shape \[4, 5\] in network 1"):
        merge_state_dicts([given[0], {**given[1], "w": given[1]["w"].T}])
    with pytest.raises(BillhookError, match="2 masks for 3"):
        merge_state_dicts(given, masks=[mask, mask])


def test_greedy_takes_what_does_not_hurt() -> None:
    value = {(1,): 0.9, (1, 2): 0.85, (1, 0): 0.9, (1, 0, 3): 0.95}
    asked: list[tuple[int, ...]] = []

    def score_of(some: list[int]) -> float:
        asked.append(tuple(some))
        return value[tuple(some)]

    assert greedy_soup([0.7, 0.9, 0.8, 0.6], score_of) == ([1, 0, 3], 0.95)
    assert asked == [(1, 2), (1, 0), (1, 0, 3)]
    assert greedy_soup([0.5, 0.5, 0.5], lambda some: 0.5)[0] == [0, 1, 2]
    assert greedy_soup([0.5, 0.4], lambda some: 0.1) == ([0], 0.5)
