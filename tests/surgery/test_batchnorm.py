"""Norms folded, put back, and counted anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.surgery.batchnorm import fold_norms_, recalibrate_norms, unfold_norms_
from billhook.surgery.channels import channel_groups, keep_channels_
from cnns import build, inputs, random_norms

FOLDED = {"vgg": 3, "basic": 10, "bottleneck": 8, "padded": 3, "dense": 2, "mobile": 4, "grouped": 1}


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_net_computes_the_same(name: str) -> None:
    model, example = build(name).double(), inputs(name).double()
    whole = copy.deepcopy(model)
    folded = fold_norms_(model, example)
    assert len(folded) == FOLDED[name]
    assert norms(model) == norms(whole) - FOLDED[name]  # DenseNet's norm after a concat stays
    torch.testing.assert_close(model(example), whole(example), rtol=1e-10, atol=1e-10)
    unfold_norms_(model, folded)
    assert norms(model) == norms(whole)
    torch.testing.assert_close(model(example), whole(example), rtol=1e-10, atol=1e-10)
    assert [type(m) for m in model.modules()] == [type(m) for m in whole.modules()]


@pytest.mark.parametrize("name", FOLDED)
def test_norms_put_back_and_counted_are_the_norms_counted(name: str) -> None:
    model, example = build(name).double(), inputs(name, batch=8).double()
    whole = copy.deepcopy(model)
    unfold_norms_(model, fold_norms_(model, example))
    assert (model(example) - whole(example)).abs().max() < 1e-10
    recalibrate_norms(whole, [example])
    recalibrate_norms(model, [example])
    off = (model(example) - whole(example)).norm() / whole(example).norm()
    assert off < 3e-3  # eps is added to a variance of another scale


def test_norms_put_back_leave_with_channels() -> None:
    model, example = build("vgg").double(), inputs("vgg").double()
    small = copy.deepcopy(model)
    unfold_norms_(small, fold_norms_(small, example))
    for net in (model, small):
        group = next(g for g in channel_groups(net, example) if g.name == "3")
        keep_channels_(net, group, torch.tensor([0, 2, 5]))
    assert small[4].num_features == 3
    torch.testing.assert_close(small(example), model(example), rtol=1e-10, atol=1e-10)


class Places(nn.Module):
    """Norms that can and cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.branch = nn.Linear(4, 4), nn.Linear(4, 4)
        self.after_twice, self.after_branch, self.features = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.tokens, self.over_tokens = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.plain, self.no_running = nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)
        self.good, self.no_affine = nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)
        self.up, self.after_up = nn.ConvTranspose1d(4, 3, 2), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_twice(self.twice(self.twice(x)))
        y = self.branch(x)
        x = self.no_affine(self.good(self.no_running(self.plain(y + self.after_branch(y)))))
        z = self.over_tokens(self.tokens(self.features(x).unsqueeze(1).repeat(1, 5, 1)))
        out: Tensor = self.after_up(self.up(x.unsqueeze(2))).mean(2)
        return out + z.mean((1, 2)).unsqueeze(1)


def test_only_what_is_alone_between_layer_and_norm_is_folded() -> None:
    torch.manual_seed(0)
    model = Places().double().eval()
    for norm in (model.after_twice, model.after_branch, model.features, model.over_tokens, model.after_up):
        random_norms(norm)
    assert model.no_affine.running_mean is not None
    model.no_affine.running_mean.normal_()
    whole, example = copy.deepcopy(model), torch.randn(6, 4, dtype=torch.double)
    assert [one.name for one in fold_norms_(model, example)] == ["no_affine", "after_up"]
    torch.testing.assert_close(model(example), whole(example), rtol=1e-10, atol=1e-10)


def test_statistics_are_plain_averages_over_the_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5), nn.BatchNorm2d(4))
    model[3].eval()
    batches = [torch.randn(5, 3, 6, 6) * (k + 1) for k in range(3)]
    recalibrate_norms(model, [(batch, None) for batch in batches])
    with torch.no_grad():
        outputs = [model[0](batch).transpose(0, 1).flatten(1) for batch in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([y.mean(1) for y in outputs]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([y.var(1) for y in outputs]).mean(0))
    # the second norm reads what the first makes with the batch's statistics, without dropout
    second = [(y - y.mean(1, True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() for y in outputs]
    torch.testing.assert_close(model[3].running_var, torch.stack([y.var(1) for y in second]).mean(0))
    assert [m.training for m in model] == [True, True, True, False]
    assert model[1].momentum == 0.3


def test_mistakes_are_said() -> None:
    with pytest.raises(BillhookError, match="Linear has no BatchNorm"):
        recalibrate_norms(nn.Linear(2, 2), [torch.randn(2, 2)])
    with pytest.raises(BillhookError, match="no batch to count"):
        recalibrate_norms(build("vgg"), [])
    model, example = build("vgg"), inputs("vgg")
    folded = fold_norms_(model, example)
    keep_channels_(model, channel_groups(model, example)[1], torch.tensor([0]))
    with pytest.raises(BillhookError, match="before channels are removed"):
        unfold_norms_(model, folded)
    folded = fold_norms_(model := build("vgg"), example)
    unfold_norms_(model, folded)
    with pytest.raises(BillhookError, match="cannot be put back"):
        unfold_norms_(model, folded)
