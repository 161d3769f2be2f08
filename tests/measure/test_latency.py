"""What a prefill computes and where its time goes: counts and names, no times."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from billhook.measure.latency import BETWEEN, count_flops, decode, op_times, prefill, random_prompt
from billhook.surgery.shrink import drop_attention_, keep_neurons_
from billhook.surgery.slim import slim_
from tiny import VOCABULARY, build

HIDDEN, NEURONS, LAYERS, HEADS, KV_HEADS, WIDTH = 32, 48, 3, 4, 2, 8


def test_prompts_are_random_within_the_vocabulary_and_repeat() -> None:
    ids = random_prompt(VOCABULARY, 40, seed=3)
    assert ids.shape == (1, 40)
    assert 0 <= int(ids.min()) <= int(ids.max()) < VOCABULARY
    assert torch.equal(ids, random_prompt(VOCABULARY, 40, seed=3))
    assert not torch.equal(ids, random_prompt(VOCABULARY, 40, seed=4))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_decoding_goes_on_where_the_prefill_ended(family: str) -> None:
    model: Any = build(family)
    ids = random_prompt(VOCABULARY, 12, seed=0)
    seconds, cache, token = prefill(model, ids)
    assert seconds > 0
    with torch.no_grad():
        assert int(token) == int(model(ids).logits[0, -1].argmax())
    assert decode(model, cache, token, 5) > 0
    assert cache.get_seq_length() == 17


def _llama_flops(tokens: int, neurons: list[int]) -> int:
    per_layer = 2 * tokens * HIDDEN * (2 * HEADS * WIDTH + 2 * KV_HEADS * WIDTH)
    attention = 2 * HEADS * tokens * tokens * 2 * WIDTH
    head = 2 * HIDDEN * VOCABULARY  # of the last token only
    return sum(per_layer + attention + 2 * tokens * 3 * HIDDEN * n for n in neurons) + head


def test_flops_are_those_of_the_shapes() -> None:
    model = build("llama")
    ids = random_prompt(VOCABULARY, 24, seed=0)
    assert count_flops(model, ids) == _llama_flops(24, [NEURONS] * LAYERS)
    zeros = copy.deepcopy(model)
    for parameter in zeros.parameters():
        parameter.data.zero_()
    assert count_flops(zeros, ids) == count_flops(model, ids)  # a dense kernel multiplies zeros too


def test_eager_and_fused_attention_count_the_same() -> None:
    model: Any = build("llama")
    ids = random_prompt(VOCABULARY, 24, seed=0)
    fused = count_flops(model, ids)
    model.set_attn_implementation("eager")
    assert count_flops(model, ids) == fused


def test_removed_neurons_and_layers_leave_the_flops() -> None:
    model: Any = build("llama")
    slim_(model)
    for block, neurons in zip(model.model.layers, (16, 32, 48), strict=True):
        keep_neurons_(block, torch.arange(neurons))
    ids = random_prompt(VOCABULARY, 24, seed=0)
    whole = count_flops(model, ids)
    assert whole == _llama_flops(24, [16, 32, 48])
    drop_attention_(model.model.layers[1])
    attention = 2 * 24 * HIDDEN * (2 * HEADS * WIDTH + 2 * KV_HEADS * WIDTH) + 2 * HEADS * 24 * 24 * 2 * WIDTH
    assert count_flops(model, ids) == whole - attention


def test_the_profile_names_the_operations() -> None:
    times = op_times(build("llama"), random_prompt(VOCABULARY, 24, seed=0), repeats=2)
    assert {"aten::mm", BETWEEN} <= set(times)
    assert times["aten::mm"].calls == 7 * LAYERS + 1
    assert times[BETWEEN].calls == 1
    assert times["aten::mm"].shapes.count("[") == 2
    assert all(time.seconds >= 0 for time in times.values())
