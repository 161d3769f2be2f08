"""Which parameters a group holds, against what the architectures are known to have."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from billhook import BillhookError
from billhook.anatomy import anatomy_of, sites_of
from billhook.recover import (
    adapter_parameters,
    attach,
    bias_parameters,
    counts,
    head_module,
    head_parameters,
    norm_parameters,
    parameters_of,
)
from tiny import FAMILIES, build


def on_meta(cls: str, config: transformers.PretrainedConfig) -> nn.Module:
    """A model of full size without memory."""
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, cls)(config)
    return model


def llama(layers: int, width: int, intermediate: int, heads: int, kv_heads: int, tied: bool) -> nn.Module:
    return on_meta(
        "LlamaForCausalLM",
        transformers.LlamaConfig(
            vocab_size=1000,  # has no part in what is counted
            hidden_size=width,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=tied,
        ),
    )


def attach_one(model: nn.Module, name: str, rank: int = 2) -> None:
    module = model.get_submodule(name)
    keep = torch.ones(module.weight.shape, dtype=torch.bool)
    attach(module, "lora", keep, rank, 4.0, torch.Generator())


def test_smollm2_135m() -> None:
    model = llama(30, 576, 1536, 9, 3, tied=True)
    assert counts(model) == {"norm": 61 * 576, "bias": 0, "head": 0, "adapters": 0}
    assert 61 * 576 == 35_136


def test_llama2_7b() -> None:
    model = llama(32, 4096, 11008, 32, 32, tied=False)
    assert counts(model) == {"norm": 266_240, "bias": 0, "head": 0, "adapters": 0}


def test_opt_125m() -> None:
    model = on_meta("OPTForCausalLM", transformers.OPTConfig(vocab_size=1000))
    width, feed, layers = 768, 3072, 12
    norms = 2 * layers + 1
    found = counts(model)
    assert found["norm"] == norms * 2 * width  # weights and biases
    assert found["bias"] == norms * width + layers * (4 * width + feed + width)
    union = parameters_of(model, {"norm", "bias"})
    assert sum(p.numel() for group in union.values() for p in group.values()) == found["bias"] + norms * width


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_those_that_are_named_so(family: str) -> None:
    """An independent reading: in these families every norm layer, and nothing else, is called by one of these names."""
    model = build(family)
    words = ("norm", "ln_", "layernorm")
    expected = {
        name
        for name, _ in model.named_parameters()
        if any(word in name.split(".")[-2].lower() for word in words) and name.split(".")[-1] in ("weight", "bias")
    }
    found = norm_parameters(model)
    assert expected
    assert found.keys() == expected
    assert all(model.get_parameter(name) is parameter for name, parameter in found.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_are_those_that_are_named_so(family: str) -> None:
    model = build(family)
    expected = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert bias_parameters(model).keys() == expected


def test_biases_outside_the_pruned_layers_are_listed_too() -> None:
    names = bias_parameters(build("vit")).keys()
    assert any("patch_embeddings" in name for name in names)
    assert "classifier.bias" in names


@pytest.mark.parametrize("layer", [nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)])
def test_norm_layers_of_pytorch(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer)
    assert norm_parameters(model).keys() == {f"1.{name}" for name, _ in layer.named_parameters()}


class Scale(nn.Module):
    """A vector that multiplies, but does not normalise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Quantised(nn.Module):
    """A matrix with an epsilon, that is no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.eps = 1e-6


class HeadNorm(Quantised):
    """A norm with a weight for each head."""


class Wrapper(nn.Module):
    """A module with children."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.eps = 1e-6
        self.inner = nn.Linear(4, 4)


class Stepper(Scale):
    """A module whose number only ends like an epsilon."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 3.0


def test_structure_decides_what_is_a_norm() -> None:
    model = nn.ModuleDict(
        {"a": Scale(), "b": Quantised(), "c": Wrapper(), "d": Stepper(), "e": nn.LayerNorm(4, elementwise_affine=False)}
    )
    assert norm_parameters(model) == {}
    assert norm_parameters(HeadNorm()).keys() == {"weight"}


def test_a_shared_parameter_is_listed_once() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    model[1].weight = model[0].weight
    assert norm_parameters(model).keys() == {"0.weight", "0.bias", "1.bias"}


# -- adapters and head -----------------------------------------------------------------------------------------------


def test_adapters_and_the_heads_adapter_are_two_groups() -> None:
    model = build("mistral")
    assert counts(model)["adapters"] == 0
    attach_one(model, "model.layers.0.self_attn.q_proj")
    attach_one(model, "lm_head", rank=3)
    inside = {f"model.layers.0.self_attn.q_proj.parametrizations.weight.0.{f}" for f in "ab"}
    assert adapter_parameters(model).keys() == inside
    assert head_parameters(model).keys() == {f"lm_head.parametrizations.weight.0.{f}" for f in "ab"}
    assert counts(model)["adapters"] == 2 * (32 + 32)
    assert counts(model)["head"] == 3 * (32 + 96)
    assert counts(model)["norm"] == 7 * 32
    assert adapter_parameters(model.model.layers[0]).keys() == {n.removeprefix("model.layers.0.") for n in inside}


@pytest.mark.parametrize(("family", "head"), [("mistral", "lm_head"), ("vit", "classifier")])
def test_the_head_is_found(family: str, head: str) -> None:
    model = build(family)
    assert head_module(model) is model.get_submodule(head)
    attach_one(model, head)
    assert head_module(model) is model.get_submodule(head)
    assert len(head_parameters(model)) == 2


def test_a_head_that_is_tied_or_missing_is_refused() -> None:
    with pytest.raises(BillhookError, match=r"LlamaForCausalLM is tied to 'model\.embed_tokens'.*untie"):
        head_module(build("llama"))
    with pytest.raises(BillhookError, match="Sequential has no linear output head"):
        head_module(nn.Sequential(nn.Linear(2, 2)))


# -- choosing --------------------------------------------------------------------------------------------------------


def test_groups_are_disjoint_and_in_order() -> None:
    model = build("gpt2")
    for site in sites_of(model, anatomy_of(model))[0]:
        attach(site.module, "lora", torch.ones(site.shape, dtype=torch.bool), 2, 4.0, torch.Generator())
    chosen = parameters_of(model, ["adapters", "bias", "norm"])
    assert list(chosen) == ["norm", "bias", "adapters"]
    everything = [id(p) for group in chosen.values() for p in group.values()]
    assert len(everything) == len(set(everything))
    assert "transformer.ln_f.bias" in chosen["norm"]
    assert not any("ln_" in name for name in chosen["bias"])
    assert any("ln_" in name for name in parameters_of(model, ["bias"])["bias"])


def test_an_empty_group_is_named_with_what_there_is() -> None:
    model = build("llama")
    match = r"LlamaForCausalLM has no parameters in the group 'bias': it has norm \(224 parameters\), so choose"
    with pytest.raises(BillhookError, match=match):
        parameters_of(model, {"norm", "bias"})
    with pytest.raises(BillhookError, match=r"group 'adapters': it has norm \(224 .*attach adapters first"):
        parameters_of(model, {"adapters"})
    with pytest.raises(BillhookError, match=r"Linear has no parameters in the group 'norm': it has none in any group"):
        parameters_of(nn.Linear(2, 2, bias=False), {"norm"})
    with pytest.raises(BillhookError, match=r"Group 'norms' is not known \(did you mean 'norm'\?\)"):
        parameters_of(model, ["norms"])  # type: ignore[list-item]
    with pytest.raises(BillhookError, match="No group of parameters is chosen"):
        parameters_of(model, [])
