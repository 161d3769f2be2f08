"""Per-sample gradients against autograd, sample by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from billhook import BillhookError
from billhook.calibrate import fisher
from billhook.calibrate.fisher import LossFn, label_losses, next_token_losses, sample_gradients
from tiny import batches_for, build

GATE, QUERY, KEY = "model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
DOWN = "model.layers.2.mlp.down_proj"
# per family: layers, among them the first and the last of the blocks, and layers that share their input
LAYERS = {
    "llama": [QUERY, KEY, GATE, DOWN],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc", "transformer.h.2.mlp.c_proj"],
    "opt": ["model.decoder.layers.0.fc1", "model.decoder.layers.2.fc2"],
}


def looped(model: nn.Module, name: str, batch: Any, loss_fn: LossFn, samples: int) -> Tensor:
    """Gradient of every sample's loss with respect to the whole weight, by autograd, as [S, out, in]."""
    layer = model.get_submodule(name)
    weight: Any = layer.weight
    weight.requires_grad_(True)
    result = []
    for s in range(samples):
        part = {k: v[s : s + 1] for k, v in batch.items()} if isinstance(batch, dict) else batch[s : s + 1]
        (gradient,) = torch.autograd.grad(loss_fn(model, part).sum(), weight)
        result.append(gradient if isinstance(layer, nn.Linear) else gradient.T)
    return torch.stack(result)


def entries(shape: tuple[int, int], count: int = 200) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows, columns = (torch.randint(0, size, (count,), generator=generator) for size in shape)
    return rows, columns


def close(actual: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", LAYERS)
def test_gathered_gradients_equal_autograd_looped_over_samples(family: str) -> None:
    model, ids = build(family), batches_for(family, size=4)[0]
    result = sample_gradients(model, LAYERS[family], ids, next_token_losses)
    with torch.no_grad():
        torch.testing.assert_close(result.losses, next_token_losses(model, ids))
    for name in LAYERS[family]:
        expected = looped(model, name, ids, next_token_losses, 4)
        layer = result[name]
        assert layer.shape == expected.shape[1:]
        assert layer.samples == 4
        rows, columns = entries(layer.shape)
        found = layer.gather(rows, columns)
        assert found.dtype == torch.float32
        close(found, expected[:, rows, columns])
        close(layer.mean(), expected.mean(0))
        assert not torch.allclose(found[0], found[1], rtol=0.1)


def test_mean_is_the_ordinary_gradient_of_the_mean_loss() -> None:
    model, ids = build("llama"), batches_for("llama", size=4)[0]
    mean = sample_gradients(model, [GATE], ids, next_token_losses)[GATE].mean()
    next_token_losses(model, ids).mean().backward()
    close(mean, model.get_submodule(GATE).weight.grad)  # type: ignore[arg-type]


def test_gathering_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama"), batches_for("llama", size=3)[0]
    layer = sample_gradients(model, [GATE], ids, next_token_losses)[GATE]
    rows, columns = entries(layer.shape)
    whole = layer.gather(rows, columns)
    monkeypatch.setattr(fisher, "_CHUNK", 24 * 7)  # seven entries at a time
    torch.testing.assert_close(layer.gather(rows, columns), whole, rtol=1e-5, atol=1e-7)
    assert layer.gather(rows[:0], columns[:0]).shape == (3, 0)


@pytest.mark.parametrize("as_pair", [False, True])
def test_classifier_gradients_equal_autograd(as_pair: bool) -> None:
    model, x = build("vit"), batches_for("vit", size=4)[0]
    labels = torch.tensor([0, 3, 4, 1])
    batch = {"pixel_values": x, "labels": labels}
    # the classifier reads one token per sample: a two-dimensional input
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [names[0], names[-2], "classifier"]
    result = sample_gradients(model, names, (x, labels) if as_pair else batch, label_losses)
    for name in names:
        expected = looped(model, name, batch, label_losses, 4)
        rows, columns = entries(result[name].shape)
        close(result[name].gather(rows, columns), expected[:, rows, columns])
        close(result[name].mean(), expected.mean(0))
    with torch.no_grad():
        logits = model(x).logits.double()
    expected_losses = -logits.log_softmax(-1)[torch.arange(4), labels]
    torch.testing.assert_close(result.losses.double(), expected_losses, rtol=1e-5, atol=1e-6)


class Mlp(nn.Module):
    """With everything that can go wrong in hooks: in-place activation, dropout, batch norm, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.twice = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(nn.functional.relu(self.first(x), inplace=True))
        x = nn.functional.relu(self.twice(input=x), inplace=True)
        x = nn.functional.relu(self.twice(x))
        return self.last(self.drop(x))


def mlp(seed: int = 0) -> tuple[Mlp, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    model = Mlp()
    model.norm.running_mean.normal_()  # type: ignore[union-attr]
    x = torch.randn(5, 6)
    return model, (x, torch.tensor([0, 1, 2, 1, 0]))


def test_in_place_activations_and_repeated_calls_are_accounted_for() -> None:
    model, (x, labels) = mlp()
    model.train()
    statistics = model.norm.running_mean.clone()  # type: ignore[union-attr]
    names = ["first", "twice", "last"]
    result = sample_gradients(model, names, (x, labels), label_losses)
    assert torch.equal(model.norm.running_mean, statistics)  # type: ignore[arg-type]
    assert len(result["twice"].calls) == 2
    model.eval()
    for name in names:
        expected = looped(model, name, {"x": x, "labels": labels}, label_losses, 5)
        rows, columns = entries(result[name].shape)
        close(result[name].gather(rows, columns), expected[:, rows, columns])
        close(result[name].mean(), expected.mean(0))


def snapshot(model: nn.Module) -> list[Any]:
    return [
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        getattr(getattr(model, "config", None), "use_cache", None),
    ]


@pytest.mark.parametrize("trainable", ["all", "none", "chosen"])
@pytest.mark.parametrize("fails", [False, True])
def test_flags_modes_and_hooks_are_as_before(trainable: str, fails: bool) -> None:
    model, ids = build("llama"), batches_for("llama")[0]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable == "all" or (trainable == "chosen" and name.startswith(GATE)))
    model.train()
    model.get_submodule("model.layers.1").eval()  # modes may be mixed
    before = snapshot(model)

    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        assert not any(module.training for module in model.modules())
        result = next_token_losses(model, ids)
        if fails:
            raise RuntimeError("on the way")
        return result

    if fails:
        with pytest.raises(RuntimeError, match="on the way"):
            sample_gradients(model, [GATE, DOWN], ids, losses)
    else:
        with torch.no_grad():
            result = sample_gradients(model, [GATE, DOWN], ids, losses)
        assert result[GATE].mean().abs().max() > 0
        assert not result[GATE].mean().requires_grad
    assert snapshot(model) == before


def test_layers_that_share_an_input_share_its_memory() -> None:
    model, ids = build("llama"), batches_for("llama")[0]
    result = sample_gradients(model, [QUERY, KEY], ids, next_token_losses)
    inputs = [result[name].calls[0][0] for name in (QUERY, KEY)]
    assert inputs[0].data_ptr() == inputs[1].data_ptr()


def test_gradients_of_a_half_precision_model_are_summed_in_float32() -> None:
    ids = batches_for("llama", size=3)[0]
    exact = sample_gradients(build("llama"), [GATE], ids, next_token_losses)[GATE].mean()
    layer = sample_gradients(build("llama").bfloat16(), [GATE], ids, next_token_losses)[GATE]
    x, d = layer.calls[0]
    assert x.dtype == d.dtype == torch.bfloat16
    rows, columns = entries(layer.shape)
    by_hand = torch.einsum("sto,sti->soi", d.double(), x.double())
    torch.testing.assert_close(layer.gather(rows, columns).double(), by_hand[:, rows, columns], rtol=1e-4, atol=1e-7)
    assert float((layer.mean() - exact).norm() / exact.norm()) < 0.1


def test_next_token_losses_are_means_over_each_sequence() -> None:
    model, ids = build("llama"), batches_for("llama", size=3)[0]
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
        losses = next_token_losses(model, ids)
    for s in range(3):
        expected = -logits[s, :-1].log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[s, 1:]].mean()
        assert float(losses[s]) == pytest.approx(float(expected), rel=1e-5)
    assert losses.dtype == torch.float32


def test_losses_of_a_half_precision_model_are_float32() -> None:
    model, ids = build("llama").bfloat16(), batches_for("llama", size=3)[0]
    with torch.no_grad():
        losses = next_token_losses(model, ids)
        expected = (
            -model(input_ids=ids).logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None]).mean((1, 2))
        )
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_no_target(left: bool) -> None:
    model, ids = build("llama"), batches_for("llama", size=2)[0]
    short = ids[1, :9]
    mask = torch.ones_like(ids)
    padded = ids.clone()
    if left:
        padded[1, :-9], padded[1, -9:], mask[1, :-9] = 0, short, 0
    else:
        padded[1, 9:], mask[1, 9:] = 0, 0
    batch = {"input_ids": padded, "attention_mask": mask}
    with torch.no_grad():
        losses = next_token_losses(model, batch)
        torch.testing.assert_close(losses[0], next_token_losses(model, ids[:1])[0])
        torch.testing.assert_close(losses[1], next_token_losses(model, short[None])[0], rtol=1e-4, atol=1e-5)
    gradients = sample_gradients(model, [GATE], batch, next_token_losses)[GATE]
    alone = sample_gradients(model, [GATE], short[None], next_token_losses)[GATE]
    rows, columns = entries(gradients.shape)
    close(gradients.gather(rows, columns)[1], alone.gather(rows, columns)[0])


def test_mistakes_are_named() -> None:
    model, ids = build("llama"), batches_for("llama")[0]
    with pytest.raises(BillhookError, match=r"no layer 'model.layers.0.mlp.gate_prj' \(did you mean '.*gate_proj'\?\)"):
        sample_gradients(model, ["model.layers.0.mlp.gate_prj"], ids, next_token_losses)
    with pytest.raises(BillhookError, match="is a LlamaMLP"):
        sample_gradients(model, ["model.layers.0.mlp"], ids, next_token_losses)
    with pytest.raises(BillhookError, match="one loss per sample"):
        sample_gradients(model, [GATE], ids, lambda m, b: next_token_losses(m, b).mean())
    with pytest.raises(BillhookError, match="at least two tokens"):
        next_token_losses(model, ids[:, :1])
    with pytest.raises(BillhookError, match="no batch of sequences"):
        next_token_losses(model, ids[0])
    with pytest.raises(BillhookError, match=r"no labels \(keys: x\)"):
        label_losses(model, {"x": ids})
    with pytest.raises(BillhookError, match="pair"):
        label_losses(model, ids)
    before = snapshot(model)
    with pytest.raises(BillhookError, match="loss of sample 1 is not finite"):
        sample_gradients(model, [GATE], ids, lambda m, b: next_token_losses(m, b) / torch.tensor([1.0, 0.0]))
    assert snapshot(model) == before
    with pytest.raises(BillhookError, match="in memory"):
        sample_gradients(build("llama").to("meta"), [GATE], ids, next_token_losses)


def test_layers_that_cannot_be_read_are_named() -> None:
    model, batch = mlp()
    with pytest.raises(BillhookError, match="does not depend on layer idle"):
        sample_gradients(model, ["last", "idle"], batch, label_losses)
    with pytest.raises(BillhookError, match="does not depend on layer first"):
        sample_gradients(model, ["first"], batch, lambda m, b: m(b[0]).detach().sum(1))

    class Flat(nn.Module):
        def __init__(self, spoil: bool) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.spoil = spoil

        def forward(self, x: Tensor) -> Tensor:
            if self.spoil:
                x = x.clone()
                y = self.layer(x)
                x += 1.0
                return y + x
            return self.layer(x.reshape(-1, 4)).reshape(len(x), -1)

    flat, x = Flat(False), torch.randn(3, 5, 4)
    with pytest.raises(BillhookError, match=r"reads an input of shape \[15, 4\] for 3 samples"):
        sample_gradients(flat, ["layer"], (x, torch.zeros(3, dtype=torch.int64)), label_losses)
    with pytest.raises(BillhookError, match="changed in place"):
        sample_gradients(Flat(True), ["layer"], (x[:, 0], torch.zeros(3, dtype=torch.int64)), label_losses)


def test_routed_tokens_are_refused_even_if_their_number_divides() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.expert = nn.Linear(4, 9)

        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.embed(input_ids)
            logits = torch.zeros(*input_ids.shape, 9)
            chosen = input_ids < 4
            logits[chosen] = self.expert(hidden[chosen])
            return logits

    ids = torch.tensor([[1, 2, 3, 8, 8, 8], [8, 8, 8, 8, 1, 8]])  # three tokens of one sequence, one of the other
    with pytest.raises(BillhookError, match=r"reads an input of shape \[4, 4\] for 2 samples"):
        sample_gradients(Routed(), ["expert"], ids, next_token_losses)


def test_indices_outside_of_the_weight_are_refused() -> None:
    model, batch = mlp()
    layer = sample_gradients(model, ["last"], batch, label_losses)["last"]
    zero = torch.zeros(1, dtype=torch.int64)
    for rows, columns in [(zero + 3, zero), (zero, zero + 8), (zero - 1, zero)]:
        with pytest.raises(BillhookError, match="weight is 3 x 8"):
            layer.gather(rows, columns)
    with pytest.raises(BillhookError, match="same length"):
        layer.gather(zero, torch.zeros(2, dtype=torch.int64))
