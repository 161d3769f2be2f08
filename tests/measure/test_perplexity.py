"""Perplexity by hand, in memory, from disk and under a memory limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import billhook as bh
from billhook.calibrate.walk import Walk
from billhook.errors import BillhookError
from billhook.measure import evaluate, folder_size, model_size
from billhook.system import resident_memory
from tiny import TEXT_FAMILIES, VOCABULARY, build

MakeFolder = Callable[..., Path]


def windows_of(count: int = 6, length: int = 16, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def by_hand(model: nn.Module, windows: torch.Tensor) -> float:
    """A log-softmax and a sum, token by token, in float64."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for window in windows:
            logits = model(window[None]).logits[0].double()
            for position in range(len(window) - 1):
                row = logits[position]
                target = int(window[position + 1])
                total += float(torch.logsumexp(row, 0) - row[target])
                tokens += 1
    return math.exp(total / tokens)


def silence(model: nn.Module) -> None:
    """All logits equal."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()


def test_uniform_logits_give_the_size_of_the_vocabulary() -> None:
    model = build("qwen2")
    silence(model)
    assert bh.perplexity(model, windows_of()) == pytest.approx(VOCABULARY, rel=1e-6)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_equals_a_computation_by_hand(family: str) -> None:
    model, windows = build(family), windows_of(3)
    assert bh.perplexity(model, windows) == pytest.approx(by_hand(model, windows), rel=1e-5)


def test_does_not_depend_on_the_batch_size() -> None:
    model, windows = build("llama"), windows_of(7)
    values = [bh.perplexity(model, windows, batch=n) for n in (1, 2, 3, 7, 100)]
    assert values == pytest.approx([values[0]] * len(values), rel=1e-6)


def test_depends_on_the_order_of_tokens_and_on_every_window() -> None:
    model, windows = build("llama"), windows_of()
    value = bh.perplexity(model, windows)
    assert bh.perplexity(model, windows.flip(1)) != pytest.approx(value, rel=1e-4)
    assert bh.perplexity(model, windows[:-1]) != pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_streamed_equals_resident(family: str, dtype: torch.dtype, make_folder: MakeFolder) -> None:
    folder = make_folder(family, dtype=dtype)
    resident, _ = bh.load(folder)
    streamed, _ = bh.load(folder, stream=True)
    windows = windows_of()
    expected = bh.perplexity(resident, windows)
    assert bh.perplexity(streamed, windows) == pytest.approx(expected, rel=1e-6)
    assert bh.perplexity(streamed, windows) == pytest.approx(expected, rel=1e-6)  # and again
    assert bh.perplexity(resident, windows, device="cpu") == pytest.approx(expected, rel=1e-6)  # block by block


def test_spilling_to_disk_changes_nothing(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed, _ = bh.load(make_folder(), stream=True)
    windows = windows_of()
    expected = bh.perplexity(streamed, windows, batch=2)
    spilled: list[bool] = []
    must_spill = Walk._must_spill

    def spy(self: Walk) -> bool:
        must_spill(self)
        spilled.append(self.max_memory is not None)
        return self.max_memory is not None

    monkeypatch.setattr(Walk, "_must_spill", spy)
    assert bh.perplexity(streamed, windows, batch=2, max_memory=resident_memory() + 10**9) == expected
    assert spilled == [True]


def test_too_little_memory_is_said(make_folder: MakeFolder) -> None:
    streamed, _ = bh.load(make_folder(), stream=True)
    with pytest.raises(BillhookError, match=r"max-memory 1e-06 GB is too little: one block"):
        bh.perplexity(streamed, windows_of(), max_memory=1000)


def test_logits_that_are_not_numbers() -> None:
    model = build("qwen2")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = math.nan
    assert math.isnan(bh.perplexity(model, windows_of()))


def test_a_streamed_head_that_is_not_finite_is_named(make_folder: MakeFolder) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_folder("qwen2")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][5] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = bh.load(folder, stream=True)
    with pytest.raises(bh.BillhookError, match=r"Tensor 'lm_head\.weight'"):
        bh.perplexity(model, windows_of())


def test_a_hopeless_model_is_infinitely_perplexed() -> None:
    model = build("qwen2")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e5)
    assert bh.perplexity(model, windows_of()) == math.inf


def test_leaves_the_model_as_it_was() -> None:
    model = build("llama").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    bh.perplexity(model, windows_of())
    bh.perplexity(model, windows_of(), device="cpu")
    assert model.training
    assert model.config.use_cache
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (3, 0), (8,), (1, 2, 3)])
def test_windows_without_anything_to_predict(shape: tuple[int, ...]) -> None:
    with pytest.raises(BillhookError, match="hold nothing to predict"):
        bh.perplexity(build("llama"), torch.zeros(shape, dtype=torch.long))


def test_evaluation_states_its_protocol(make_folder: MakeFolder) -> None:
    streamed, _ = bh.load(make_folder(), stream=True, dtype=torch.bfloat16)
    result = evaluate(streamed, windows_of(6, 16), "some text")
    assert (result.data, result.length, result.windows, result.tokens) == ("some text", 16, 6, 90)
    assert result.dtype == "bfloat16"
    assert result.perplexity == bh.perplexity(streamed, windows_of(6, 16))


def test_sizes_of_folder_and_model_agree(make_folder: MakeFolder) -> None:
    folder = make_folder("llama")  # tied embeddings: counted once
    model, _ = bh.load(folder)
    bh.prune(model, bh.Magnitude(sparsity=0.5))
    model.save_pretrained(folder)
    on_disk, in_memory = folder_size(folder), model_size(model)
    assert on_disk.parameters == in_memory.parameters == sum(p.numel() for p in model.parameters())
    assert on_disk.nonzero == in_memory.nonzero < on_disk.parameters
    assert in_memory.bytes == 4 * in_memory.parameters
    assert on_disk.bytes == (folder / "model.safetensors").stat().st_size
