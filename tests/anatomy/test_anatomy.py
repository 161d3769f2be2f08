"""What the declarations say about each family, and declarations of one's own."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import billhook as bh
from billhook.anatomy import anatomy as declarations
from billhook.anatomy import anatomy_of, block_names, families, find_blocks, sites_of
from billhook.anatomy.sites import stages_of
from billhook.calibrate.statistics import Statistic
from billhook.errors import BillhookError
from tiny import FAMILIES, batches_for, build


@pytest.fixture(autouse=True)
def _own_declarations_end_with_the_test() -> Iterator[None]:
    before = dict(declarations._FAMILIES)
    yield
    declarations._FAMILIES.clear()
    declarations._FAMILIES.update(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_in_a_block_is_a_site_and_none_outside(family: str) -> None:
    model = build(family)
    anatomy = anatomy_of(model)
    blocks = sites_of(model, anatomy)
    assert len(blocks) == 3
    for index, (name, sites) in enumerate(zip(block_names(model, anatomy), blocks, strict=True)):
        inside = {n for n, m in model.get_submodule(name).named_modules() if isinstance(m, nn.Linear | Conv1D)}
        assert {site.projection for site in sites} == inside
        assert len(sites) == len(inside)
        for site in sites:
            assert site.block == index
            assert site.name == f"{name}.{site.projection}"
            assert model.get_submodule(site.name) is site.module
    outside = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    outside -= {site.name for sites in blocks for site in sites}
    assert outside <= {anatomy.head, *anatomy.readers}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_declared_part_is_there(family: str) -> None:
    model = build(family)
    anatomy = anatomy_of(model)
    assert (anatomy.final_norm is None) == (anatomy.layout == "post")  # whose blocks end in a norm
    for path in (*anatomy.embeddings, anatomy.final_norm, anatomy.head):
        if path is not None:
            model.get_submodule(path)
    assert anatomy.head is not None
    for block in find_blocks(model, anatomy):
        for path in anatomy.norms:
            assert "norm" in type(block.get_submodule(path)).__name__.lower()
    linear = [m for b in find_blocks(model, anatomy) for m in b.modules() if isinstance(m, nn.Linear | Conv1D)]
    assert any(isinstance(m, Conv1D) for m in linear) == anatomy.conv1d


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_are_the_inputs_as_they_are_really_shared(family: str) -> None:
    """Recorded from a forward pass: projections of a stage read one tensor, and stages run in their order."""
    model = build(family)
    anatomy = anatomy_of(model)
    sites = sites_of(model, anatomy)[0]
    seen: list[tuple[str, torch.Tensor]] = []
    for site in sites:
        site.module.register_forward_pre_hook(lambda m, a, p=site.projection: seen.append((p, a[0])))
    with torch.no_grad():
        model(batches_for(family, count=1)[0])
    groups: list[list[str]] = []
    tensors: list[torch.Tensor] = []
    for projection, tensor in seen:
        same = next((i for i, t in enumerate(tensors) if t is tensor), None)
        if same is None:
            tensors.append(tensor)
            groups.append([projection])
        else:
            groups[same].append(projection)
    stages = [{site.projection for site in stage} for stage in stages_of(sites, anatomy)]
    if family == "phi" or (family == "gpt_neox" and groups[-1] != list(anatomy.stages[-1])):
        # attention and feed-forward stand side by side and may read one normalised tensor
        assert set().union(*stages) == {p for p, _ in seen}
    else:
        assert stages == [set(group) for group in groups]


@pytest.mark.parametrize(
    ("family", "blocks", "head"),
    [
        ("bert-base", "encoder.layer", None),
        ("bert-classifier", "bert.encoder.layer", "classifier"),
        ("bert-tagger", "bert.encoder.layer", "classifier"),
        ("llama-base", "layers", None),
        ("llama-classifier", "model.layers", "score"),
        ("vit-base", "layers", None),
    ],
)
def test_other_classes_of_a_family_have_their_own_paths(family: str, blocks: str, head: str | None) -> None:
    model = build(family)
    anatomy = anatomy_of(model)
    assert (anatomy.blocks, anatomy.head) == (blocks, head)
    for path in (*anatomy.embeddings, anatomy.final_norm):
        if path is not None:
            model.get_submodule(path)
    before = sum(int((p == 0).sum()) for p in model.parameters())
    bh.prune(model, bh.Wanda(sparsity=0.5), batches_for(family))
    sites = [site for block in sites_of(model, anatomy) for site in block]
    assert sum(int((p == 0).sum()) for p in model.parameters()) - before == sum(s.numel for s in sites) // 2


def test_gated_means_gate_then_up() -> None:
    for anatomy in families().values():
        if anatomy.mlp and anatomy.mlp.gated and len(anatomy.mlp.inputs) == 2:
            assert "gate" in anatomy.mlp.inputs[0]
            assert "up" in anatomy.mlp.inputs[1]


def test_families_stays_a_function_after_it_was_used() -> None:
    anatomy_of(build("llama"))
    from billhook.anatomy import families as again

    assert callable(again)
    assert {"llama", "gpt2", "vit"} <= again().keys()


# -- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weight_is_out_by_in_and_a_view(family: str) -> None:
    model = build(family)
    site = next(s for s in sites_of(model, anatomy_of(model))[1] if s.shape[0] != s.shape[1])
    parameter = site.module.weight
    assert isinstance(site.module, Conv1D) == (family == "gpt2")
    inputs = torch.eye(site.shape[1])
    with torch.no_grad():
        bias = 0 if site.module.bias is None else site.module.bias
        torch.testing.assert_close(site.module(inputs) - bias, site.weight.T)
    site.weight[2, 1] = 7.0
    assert (parameter.T if family == "gpt2" else parameter)[2, 1].item() == 7.0
    assert site.shape == tuple(site.weight.shape)
    assert site.numel == parameter.numel()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mask_and_write(family: str) -> None:
    model = build(family)
    site = sites_of(model, anatomy_of(model))[0][-1]
    keep = torch.rand(site.shape) < 0.5
    expected = torch.where(keep, site.weight, torch.zeros(()))
    site.mask(keep)
    assert torch.equal(site.weight, expected)
    assert not torch.signbit(site.weight[~keep]).any()  # +0, which compressed storage leaves out
    new = torch.randn(site.shape)
    site.write(new)
    assert torch.equal(site.weight, new)
    assert torch.equal(site.module.weight, new.T if family == "gpt2" else new)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_write_refuses_what_is_not_finite_in_the_models_dtype(value: float) -> None:
    model = build("llama").half()
    site = sites_of(model, anatomy_of(model))[0][0]
    before = site.weight.clone()
    new = before.float()
    new[3, 3] = value
    with pytest.raises(BillhookError, match=r"q_proj has NaN or infinite values in torch\.float16"):
        site.write(new)
    assert torch.equal(site.weight, before)


# -- what is not declared, or declared wrongly -----------------------------------------------------------------------


def test_undeclared_model_type_is_named_with_the_nearest() -> None:
    model = build("llama")
    model.config.model_type = "lama"
    with pytest.raises(BillhookError, match=r"model_type 'lama' \(did you mean '\w*llama\w*'\?\).*bh\.declare\("):
        anatomy_of(model)


def test_a_module_without_a_configuration() -> None:
    with pytest.raises(BillhookError, match=r"Linear has no config.model_type.*pass anatomy=bh.Anatomy"):
        anatomy_of(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("anatomy", "match"),
    [
        (bh.Anatomy("mine", blocks="model.layrs"), "names 'model.layrs' as blocks, but LlamaForCausalLM has no such"),
        (bh.Anatomy("mine", blocks="model.norm"), "names 'model.norm' as the blocks, but that is not a non-empty"),
        (bh.Anatomy("mine", blocks=""), "names '' as the blocks, but that is not a non-empty"),
        (
            bh.Anatomy("mine", blocks="model.layers", attention=bh.Attention(query="attn.q", output="x")),
            r"names 'model\.layers\.0\.attn\.q' as projection",
        ),
        (
            bh.Anatomy("mine", blocks="model.layers", mlp=bh.MLP(inputs=("mlp.up_proj",), output="mlp.out")),
            r"names 'model\.layers\.0\.mlp\.out' as projection",
        ),
        (bh.Anatomy("mine", blocks="model.layers", embeddings=("model.wte",)), "names 'model.wte' as embeddings"),
    ],
)
def test_parts_that_are_missing_are_named(anatomy: bh.Anatomy, match: str) -> None:
    with pytest.raises(BillhookError, match=match):
        anatomy_of(build("llama"), anatomy)


def test_blocks_without_linear_layers() -> None:
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    with pytest.raises(BillhookError, match="hold no linear layer to prune"):
        sites_of(model, bh.Anatomy("mine", blocks=""))


def test_declare_makes_a_family_known() -> None:
    model = build("llama")
    model.config.model_type = "mine"
    own = bh.declare(bh.Anatomy(family="mine", blocks="model.layers"))
    assert anatomy_of(model) is own
    report = bh.prune(model, bh.Wanda(sparsity=0.5), batches_for("llama"))
    assert report.family == "mine"
    assert len(report.steps[0].sites) == 21


def test_a_declaration_of_ones_own_wins_over_the_built_in_one() -> None:
    """Also where nothing of billhook was used before it."""
    code = (
        "import billhook as bh\n"
        "own = bh.declare(bh.Anatomy(family='llama', blocks='elsewhere'))\n"
        "from billhook.anatomy import families\n"
        "assert families()['llama'] is own\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- networks that are not from Transformers --------------------------------------------------------------------------


PLAIN = bh.Anatomy(family="plain", blocks="", input=None)


def plain_network() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(12, 4))


def plain_batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 8, generator=generator) for _ in range(3)]


def test_the_model_itself_as_the_list_of_blocks() -> None:
    model = plain_network()
    assert block_names(model, PLAIN) == ["0", "1", "2"]
    names = [[site.name for site in block] for block in sites_of(model, PLAIN)]
    assert names == [["0.0", "0.2"], [], ["2"]]


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "ria"])
def test_a_plain_sequential_is_pruned(name: str, tmp_path: Path) -> None:
    model = plain_network()
    report = bh.prune(model, bh.method(name, sparsity=0.5), plain_batches(), anatomy=PLAIN)
    assert [site.site for site in report.steps[0].sites] == ["0.0", "0.2", "2"]
    for layer in (model[0][0], model[0][2], model[2]):
        assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2
    assert torch.isfinite(model(plain_batches()[0])).all()


def test_a_plain_sequentials_layers_see_their_true_inputs() -> None:
    model = plain_network()
    norms: list[torch.Tensor] = []
    for block in bh.walk(model, plain_batches(), anatomy=PLAIN):
        found: dict[object, torch.Tensor] = block.collect(bh.ColumnNorm)
        norms += [found[site] for site in block.sites]
    x = torch.cat(plain_batches())
    inner = model[0][0](x).relu()
    last = model[0][2](inner).relu()
    for found_norm, expected in zip(norms, (x, inner, last), strict=True):
        torch.testing.assert_close(found_norm, expected.norm(dim=0), rtol=1e-2, atol=1e-3)
    assert issubclass(bh.ColumnNorm, Statistic)


def test_named_blocks() -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(8, 8), second=nn.Linear(8, 8)))
    anatomy = bh.Anatomy(family="mine", blocks="", input=None, mlp=bh.MLP(inputs=(), output=""))
    assert [[s.name for s in b] for b in sites_of(model, anatomy_of(model, anatomy))] == [["first"], ["second"]]


def test_blocks_deep_in_a_module_of_ones_own() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(8, 12)
            self.body = nn.Module()
            self.body.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for layer in self.body.layers:
                x = x + layer(x)
            return x

    model = Network()
    stem = model.stem.weight.clone()
    anatomy = bh.Anatomy(family="mine", blocks="body.layers", input=None)
    report = bh.prune(model, bh.Wanda(sparsity=0.5), plain_batches(), anatomy=anatomy)
    assert [site.site for site in report.steps[0].sites] == [f"body.layers.{i}" for i in range(3)]
    assert torch.equal(model.stem.weight, stem)
