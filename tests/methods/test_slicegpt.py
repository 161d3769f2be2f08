"""SliceGPT and its relatives: exact where nothing is cut, the sizes that were planned, files that load."""

from __future__ import annotations

import copy
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import billhook as bh
from billhook.anatomy import anatomy_of, find_blocks
from billhook.calibrate import walk as walk_module
from billhook.calibrate.influence import block_influence
from billhook.calibrate.walk import Walk
from billhook.export.folder import assemble
from billhook.run import reshape
from billhook.surgery import rotate, shrink
from billhook.surgery.modeling_slim import SlimNorm
from billhook.surgery.slim import refresh, slim_
from tiny import FAMILIES, TEXT_FAMILIES, batches_for, build, tiny_tokenizer

SLICED = [f for f in TEXT_FAMILIES if f not in ("gemma2", "gemma3_text")]


def scaled(family: str) -> Any:
    """A model whose norms have scales of their own: of ones, a forgotten scale would not show."""
    model, generator = build(family), torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.data.copy_(0.5 + torch.rand(len(parameter), generator=generator))
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids).logits
    return out


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def pruned(family: str, double: bool = False, **options: Any) -> tuple[Any, Any]:
    model = scaled(family)
    model = model.double() if double else model
    whole = copy.deepcopy(model)
    bh.prune(model, bh.method("slicegpt", **options), batches_for(family, count=4), precision="highest")
    return model, whole


@pytest.mark.parametrize("family", ["llama", "gemma", "opt", "phi", "gpt_neox"])
def test_norms_without_scales_compute_the_same(family: str) -> None:
    """Step 0 alone: scales and offsets in the readers, means taken out by the writers, no basis changed."""
    model, ids = scaled(family).double(), batches_for(family)[0]
    slim_(model)
    anatomy, want = anatomy_of(model), logits(model, ids)
    whole = torch.eye(32, dtype=torch.float64)
    for block in find_blocks(model, anatomy):
        rotate.fuse_norms_(block, model.config.slim, anatomy)
    rotate.rotate_ends_(model, anatomy, whole - 1 / 32 if anatomy.norm == "layer" else whole, whole)
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    assert norms
    assert all(isinstance(m, SlimNorm) for m in norms)
    # Transformers' RMSNorm computes in float32 whatever the model's dtype
    assert relative(logits(model, ids), want) < (1e-12 if anatomy.norm == "layer" else 1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_residual_matrices_of_a_full_rotation_are_orthogonal(family: str) -> None:
    model, whole = pruned(family, sparsity=0.0)
    ids = batches_for(family)[0]
    assert relative(logits(model, ids), logits(whole, ids)) < 1e-5
    matrices = [m.weight for n, m in model.named_modules() if n.endswith("_adapter")]
    assert len(matrices) == (3 if family == "gpt_neox" else 6)  # parallel blocks have one residual connection
    for matrix in matrices:
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(32), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", SLICED)
def test_a_full_rotation_changes_nothing(family: str) -> None:
    """Norms fused, LayerNorms centred, a basis of its own at every place: the same function (SliceGPT, theorem 1)."""
    model, whole = pruned(family, double=True, sparsity=0.0)
    ids = batches_for(family)[0]
    with torch.no_grad():
        got, want = model(ids).logits, whole(ids).logits
    # Transformers' RMSNorm computes in float32 whatever the model's dtype
    assert relative(got, want) < (1e-12 if anatomy_of(whole).norm == "layer" else 1e-5)
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    assert all(not list(m.parameters()) for m in norms if "q_norm" not in str(m) and type(m).__name__ == "SlimNorm")


@pytest.mark.parametrize("family", SLICED)
def test_a_sliced_model_has_the_planned_size_and_loads(family: str, tmp_path: Path) -> None:
    model = build(family)
    present = copy.deepcopy(model)
    reshape(present)
    batches = batches_for(family)
    method: Any = bh.method("slicegpt", sparsity=0.25)
    walk = Walk(present, batches)
    planned = method.planned(walk, method._widths(walk, [0.25] * len(walk.blocks)))
    bh.prune(model, bh.method("slicegpt", sparsity=0.25), batches)
    assert sum(p.numel() for p in model.parameters()) == planned
    streams = [layer["stream"] for layer in model.config.slim["layers"]]  # type: ignore[union-attr, index]
    assert streams[-1][-1] == 32
    assert streams[1][0] == 24
    assert streams[0][0] == (32 if family == "gpt2" else 24)  # GPT-2 reshapes its output to the width of its input
    assert all(one[-1] == other[0] for one, other in pairwise(streams))
    assemble(model, tiny_tokenizer(), tmp_path / "out")
    again: Any = bh.load(str(tmp_path / "out"))[0]
    assert torch.equal(logits(again, batches[0]), logits(model, batches[0]))
    # every token after the first comes from the cache
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = again.generate(batches[0][:, :6], **options)
    assert torch.equal(made[:, 6:], logits(again, made)[:, 5:-1].argmax(-1))


def test_the_basis_is_the_best_projection() -> None:
    """‖X − X Q Qᵀ‖² is the sum of the eigenvalues that were dropped; no basis and no set of coordinates does better."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
    values = torch.linalg.eigvalsh(x.T @ x)
    errors = []
    for width in range(1, 7):
        basis = bh.SliceGPT().basis(x.T @ x, width)  # type: ignore[attr-defined]
        torch.testing.assert_close(basis.T @ basis, torch.eye(width, dtype=torch.float64))
        lost = float((x - x @ basis @ basis.T).square().sum())
        assert lost == pytest.approx(float(values[: 6 - width].sum()), rel=1e-10, abs=1e-10)
        randoms = (torch.randn(6, width, generator=generator, dtype=torch.float64) for _ in range(100))
        coordinates = (torch.eye(6, dtype=torch.float64)[:, list(c)] for c in combinations(range(6), width))
        for other in (*(torch.linalg.qr(r).Q for r in randoms), *coordinates):
            assert float((x - x @ other @ other.T).square().sum()) >= lost - 1e-9
        errors.append(lost)
    assert errors == sorted(errors, reverse=True)  # at fixed data, more width is never worse


@pytest.mark.parametrize("family", ["opt", "llama", "gemma", "gpt_neox"])
def test_a_stream_of_low_rank_is_cut_without_loss(family: str) -> None:
    """Where embeddings and writers span 16 of 32 dimensions, half of the width goes for free."""
    model = scaled(family).double()
    anatomy = anatomy_of(model)
    # a centred subspace: LayerNorm takes the mean out
    basis = torch.randn(32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    basis = torch.linalg.qr(basis - basis.mean(0)).Q
    inside = basis @ basis.T
    assert anatomy.attention is not None
    assert anatomy.mlp is not None
    with torch.no_grad():
        for path in anatomy.embeddings:
            table: Any = model.get_submodule(path)
            table.weight.copy_(table.weight @ inside)
        for block in find_blocks(model, anatomy):
            for name in (anatomy.attention.output, anatomy.mlp.output):
                linear: Any = block.get_submodule(name)
                linear.weight.copy_(inside @ linear.weight)
                if linear.bias is not None:
                    linear.bias.copy_(inside @ linear.bias)
    whole, ids = copy.deepcopy(model), batches_for(family, count=4)
    bh.prune(model, bh.method("slicegpt", sparsity=0.5), ids, precision="highest")
    want = logits(whole, ids[0])
    # Transformers' RMSNorm computes in float32 whatever the model's dtype
    assert relative(logits(model, ids[0]), want) < (1e-9 if anatomy.norm == "layer" else 1e-5)
    # norms divide by the width before; by what is left, they would give √(16/32) of it
    norms = [m for m in model.modules() if isinstance(m, SlimNorm)]
    assert all(norm.divisor == 32 for norm in norms)
    for norm in norms:
        norm.divisor = 16
    assert relative(logits(model, ids[0]), want) > 0.05


@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_a_model_of_layer_norms_loses_one_dimension_for_free(family: str) -> None:
    """Every norm takes the mean out, so nothing flows along the vector of ones."""
    model, whole = pruned(family, double=True, sparsity=1 / 32, round=1)
    assert model.config.slim["layers"][1]["stream"][:2] == [31, 31]
    ids = batches_for(family)[0]
    assert relative(logits(model, ids), logits(whole, ids)) < 1e-9


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_turning_what_is_kept_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any orthogonal matrix may follow the principal axes: only their span is heard."""
    model, _ = pruned(family, double=True, sparsity=0.25)
    axes, generator = bh.SliceGPT.basis, torch.Generator().manual_seed(3)

    def turned(self: Any, signal: Tensor, width: int) -> Tensor:
        turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q
        return axes(self, signal, width) @ turn

    monkeypatch.setattr(bh.SliceGPT, "basis", turned)
    other, _ = pruned(family, double=True, sparsity=0.25)
    one, two = (m.get_submodule(anatomy_of(m).embeddings[0]).weight.data for m in (model, other))
    assert relative(one, two) > 0.1
    ids = batches_for(family)[0]
    assert relative(logits(other, ids), logits(model, ids)) < 1e-8


def test_a_parallel_block_without_mlp_is_sliced_like_a_sequential_one() -> None:
    """With an MLP that writes nothing the second place of a sequential block has the span of the next one's first."""
    read: list[list[Tensor]] = []
    for parallel in (True, False):
        options = FAMILIES["gpt_neox"][2]
        torch.manual_seed(0)
        model: Any = transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(**options, use_parallel_residual=parallel)
        )
        model.load_state_dict(scaled("gpt_neox").state_dict())
        model = model.double().eval()
        for layer in model.gpt_neox.layers:
            nn.init.zeros_(layer.mlp.dense_4h_to_h.weight)
            nn.init.zeros_(layer.mlp.dense_4h_to_h.bias)
        bh.prune(model, bh.method("slicegpt", sparsity=0.25), batches_for("gpt_neox"), precision="highest")
        assert [layer["adapters"] for layer in model.config.slim["layers"]] == [[True, not parallel]] * 3
        read.append([])
        for layer in model.gpt_neox.layers:
            layer.self_attn.q_proj.register_forward_hook(lambda m, args, output: read[-1].append(output))
        logits(model, batches_for("gpt_neox")[0])
    assert len(read[0]) == 3
    for one, other in zip(*read, strict=True):
        assert relative(one, other) < 1e-8


def emptied(family: str) -> Any:
    """A slim model whose first block has no MLP, the second no attention, the third neither."""
    model = scaled(family).double()
    slim_(model)
    first, second, third = find_blocks(model, anatomy_of(model))
    for block in (first, third):
        shrink.drop_mlp_(block)
    for block in (second, third):
        shrink.drop_attention_(block)
    refresh(model)
    return model


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_blocks_that_lost_their_parts_are_sliced_too(family: str) -> None:
    """With nothing cut, exactly; with the width cut, to a model that has the planned size."""
    ids = batches_for(family)[0]
    model = emptied(family)
    want = logits(model, ids)
    bh.prune(model, bh.method("slicegpt", sparsity=0), batches_for(family), precision="highest")
    assert relative(logits(model, ids), want) < 1e-6  # stock RMSNorms compute in float32
    model = emptied(family)
    method = bh.SliceGPT(sparsity=0.25)
    walk = Walk(model, batches_for(family))
    planned = method.planned(walk, method._widths(walk, [0.25] * 3))
    bh.prune(model, method, batches_for(family), precision="highest")
    assert sum(p.numel() for p in model.parameters()) == planned
    assert bool(torch.isfinite(logits(model, ids)).all())


def opt(hidden: int, heads: int) -> tuple[Any, dict[str, Any]]:
    sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "num_attention_heads": heads, "word_embed_proj_dim": hidden}
    return transformers.OPTForCausalLM, {"vocab_size": 50272, **sizes}


def llama(vocabulary: int, hidden: int, inner: int, heads: int, groups: int) -> tuple[Any, dict[str, Any]]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocabulary}
    return transformers.LlamaForCausalLM, {**sizes, "num_attention_heads": heads, "num_key_value_heads": groups}


PHI = (transformers.PhiForCausalLM, {"hidden_size": 2560, "intermediate_size": 10240, "partial_rotary_factor": 0.4})


@pytest.mark.parametrize(
    ("shape", "layers", "planned"),
    [
        (opt(768, 12), 12, {0.2: 147_250_880}),
        (opt(2048, 32), 24, {0.2: 1_283_343_552, 0.25: 1_207_988_832, 0.3: 1_127_332_152}),
        (llama(49152, 576, 1536, 9, 3), 30, {0.2: 147_489_984}),
        (llama(32000, 4096, 11008, 32, 32), 32, {0.2: -0.0938, 0.25: -0.1534, 0.3: -0.2145}),
        (PHI, 32, {0.2: 2_391_772_160}),
    ],
    ids=["OPT-125M", "OPT-1.3B", "SmolLM2-135M", "Llama-2-7B", "Phi-2"],
)
def test_planned_sizes_of_known_models(shape: Any, layers: int, planned: dict[float, float]) -> None:
    """As the authors' code counts: residual matrices and an untied head included. A negative number is the change."""
    cls, options = shape
    method: Any = bh.SliceGPT()
    sizes: list[dict[float, int]] = []
    for few in (2, 3):  # layers between the first and the last are alike, so their number can be filled in
        with torch.device("meta"):
            model = cls(cls.config_class(**options, num_hidden_layers=few))
        slim_(model)
        walk = Walk(model, batches_for("llama"))
        dense = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)  # they are fused
        widths = {r: method._widths(walk, [r] * len(walk.blocks)) for r in planned}
        sizes.append({0.0: dense} | {r: method.planned(walk, w) for r, w in widths.items()})
    full = {ratio: sizes[0][ratio] + (layers - 2) * (sizes[1][ratio] - sizes[0][ratio]) for ratio in sizes[0]}
    for ratio, want in planned.items():
        assert full[ratio] == want if want > 0 else full[ratio] / full[0.0] - 1 == pytest.approx(want, abs=5e-5)


def test_more_width_is_never_worse_on_the_stream() -> None:
    ids = batches_for("opt", count=4)
    errors = []
    for sparsity in (0.75, 0.5, 0.25, 0.0):
        model, whole = pruned("opt", sparsity=sparsity)
        with torch.no_grad():
            errors.append(float((model(ids[0]).logits - whole(ids[0]).logits).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_target_size_is_met_from_below() -> None:
    model = build("opt")
    present = sum(p.numel() for p in model.parameters())
    bh.prune(model, bh.method("slicegpt", target_size=0.9, round=1), batches_for("opt"))
    assert 0.85 * present < sum(p.numel() for p in model.parameters()) <= 0.9 * present
    with pytest.raises(bh.BillhookError, match="cannot be reached by slicing"):
        bh.prune(build("opt"), bh.method("slicegpt", target_size=0.01), batches_for("opt"))


def test_a_model_that_would_grow_is_said_before_the_work(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="billhook"):
        bh.prune(build("llama"), bh.method("slicegpt", sparsity=0.05, round=1), batches_for("llama"))
    assert "makes this model larger" in caplog.text


@pytest.mark.parametrize("family", ["gemma2", "vit"])
def test_what_cannot_be_rotated_is_refused(family: str) -> None:
    with pytest.raises(bh.BillhookError, match="cannot be rotated"):
        bh.prune(build(family), bh.method("slicegpt"), batches_for(family))


def test_slicing_twice_is_refused() -> None:
    model, _ = pruned("llama", sparsity=0.25)
    with pytest.raises(bh.BillhookError, match="rotated already"):
        bh.prune(model, bh.method("slicegpt", sparsity=0.25), batches_for("llama"))


def test_constant_dynamic_slicing_is_slicegpt() -> None:
    one, _ = pruned("llama", sparsity=0.25)
    other = scaled("llama")
    method = bh.method("dynamic-slicing", sparsity=0.25, base=0.25)
    bh.prune(other, method, batches_for("llama", count=4), precision="highest")
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_dynamic_slicing_keeps_the_mean_and_the_order() -> None:
    model = build("llama")
    influence = block_influence(Walk(copy.deepcopy(model), batches_for("llama"), precision="highest"))
    method = bh.method("dynamic-slicing", sparsity=0.5, base=0.2, round=1)
    bh.prune(model, method, batches_for("llama"), precision="highest")
    widths = [layer["stream"][0] for layer in model.config.slim["layers"]]  # type: ignore[union-attr, index]
    assert sum(widths) == pytest.approx(3 * 16, abs=3)
    assert len(set(widths)) == 3
    assert sorted(range(3), key=influence.__getitem__) == sorted(range(3), key=widths.__getitem__)


def test_each_place_has_the_width_of_the_block_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosines 0.2, 0.6, 1.0 at a mean of 0.3 and a base of 0.1 cut 0.1, 0.3 and 0.5 of 100 dimensions."""
    monkeypatch.setattr("billhook.methods.slicegpt.block_influence", lambda walk: [0.8, 0.4, 0.0])
    sizes = {"hidden_size": 100, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 96, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    models: list[Any] = []
    for multiple in (8, 1):
        models.append(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval())
        method = bh.method("dynamic-slicing", sparsity=0.3, base=0.1, round=multiple)
        bh.prune(models[-1], method, batches_for("llama", count=1))
    eights, model = models
    # rounded down; what that loses is not handed back
    assert [layer["stream"][0] for layer in eights.config.slim["layers"]] == [88, 64, 48]
    streams = [layer["stream"] for layer in model.config.slim["layers"]]
    assert streams == [[90, 90, 70], [70, 70, 50], [50, 50, 100]]
    assert model.model.embed_tokens.weight.shape[1] == 90
    for block, (before, between, after) in zip(model.model.layers, streams, strict=True):
        assert block.attention_adapter.weight.shape == (between, before)
        assert block.mlp_adapter.weight.shape == (after, between)
    assemble(model, tiny_tokenizer(), tmp_path / "out")
    again: Any = bh.load(str(tmp_path / "out"))[0]
    assert [layer["stream"] for layer in again.config.slim["layers"]] == streams
    ids = batches_for("llama")[0]
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_a_block_that_does_nothing_is_cut_most_and_one_that_turns_its_input_least() -> None:
    model = build("llama")
    layers: Any = find_blocks(model, anatomy_of(model))
    for linear in (layers[1].self_attn.o_proj, layers[1].mlp.down_proj):
        nn.init.zeros_(linear.weight)
    batches, method = batches_for("llama"), bh.method("dynamic-slicing", sparsity=0.3, base=0.1)
    quarter = torch.eye(32).roll(16, 0) * torch.tensor([1.0] * 16 + [-1.0] * 16)  # x · xJ = 0

    class Turn(type(layers[2])):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden_states @ quarter

    layers[2].__class__ = Turn
    influence = block_influence(Walk(model, batches, precision="highest"))
    assert influence[1:] == pytest.approx([0.0, 1.0], abs=1e-6)
    shares = method.shares(Walk(model, batches, precision="highest"), 0.3)  # type: ignore[attr-defined]
    assert shares.index(max(shares)) == 1
    assert min(shares) == pytest.approx(0.1)
    assert method.shares(Walk(model, batches, precision="highest"), 0.3) == shares  # type: ignore[attr-defined]
    single = [row[None] for batch in batches for row in batch]  # in batches of one sequence
    again = method.shares(Walk(model, single, precision="highest"), 0.3)  # type: ignore[attr-defined]
    assert again == pytest.approx(shares, abs=1e-6)


@pytest.mark.parametrize("influence", [[0.95, 0.1, 0.05], [0.05, 0.1, 0.95]])
def test_target_size_holds_for_uneven_widths(influence: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.methods.slicegpt.block_influence", lambda walk: influence)
    model = build("opt")
    present = sum(p.numel() for p in model.parameters())
    bh.prune(model, bh.method("dynamic-slicing", target_size=0.8, round=1), batches_for("opt"))
    assert 0.77 * present < sum(p.numel() for p in model.parameters()) <= 0.8 * present


def test_target_flops_are_found_where_every_block_has_a_base() -> None:
    bh.prune(build("opt"), bh.method("dynamic-slicing", target_flops=0.825, base=0.3, round=1), batches_for("opt"))
    with pytest.raises(bh.BillhookError, match=r"base=0\.3 is more than the mean ratio 0\.2"):
        bh.prune(build("opt"), bh.method("dynamic-slicing", sparsity=0.2, base=0.3), batches_for("opt"))


def test_normed_signals_of_layer_norms_are_centred_first() -> None:
    model: Any = build("opt").double()
    shift = torch.randn(96, 1, generator=torch.Generator().manual_seed(0)).double()
    model.model.decoder.embed_tokens.weight.data += shift
    seen: list[Tensor] = []
    ids = batches_for("opt")
    norm = model.model.decoder.layers[0].self_attn_layer_norm
    handle = norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in ids:
            model(batch)
    handle.remove()
    normed = nn.functional.layer_norm(torch.cat(seen), [32], eps=1e-12)
    slim_(model)
    reshape(model)
    method: Any = bh.method("slicegpt", signal="normed")
    walk = Walk(model, ids, precision="highest")
    centre = torch.eye(32, dtype=torch.float64) - 1 / 32
    got = method.centred(walk.entering(method.statistic(walk)), centre)
    torch.testing.assert_close(got, normed.T @ normed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_what_is_held_from_pass_to_pass_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is computed once per batch and the rest once, instead of twice and two times; in float64."""
    dense, runs = build(family).double(), []
    for held in (walk_module._HELD, 0):
        monkeypatch.setattr(walk_module, "_HELD", held)
        model, calls = copy.deepcopy(dense), 0
        forward = Walk.forward

        def counted(self: Walk, *arguments: Any, forward: Any = forward) -> Any:
            nonlocal calls
            calls += 1
            return forward(self, *arguments)

        monkeypatch.setattr(Walk, "forward", counted)
        bh.prune(model, bh.method("slicegpt", sparsity=0.25), batches_for(family, count=2), precision="highest")
        monkeypatch.setattr(Walk, "forward", forward)
        with torch.no_grad():
            runs.append((calls, model(batches_for(family, count=1)[0]).logits))
    (few, one), (many, other) = runs
    assert few < many
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_killed_run_gives_the_same_bits(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh() -> Any:
        folder = tmp_path / "model"
        if not folder.exists():
            assemble(build("llama"), tiny_tokenizer(), folder)
        return bh.load(str(folder), stream=True)[0]

    batches, method = batches_for("llama", count=4), bh.method("slicegpt", sparsity=0.25)
    bh.prune(fresh(), method, batches, out=tmp_path / "whole", precision="highest")

    from billhook.calibrate.journal import Journal

    commit = Journal.commit

    def dying(self: Journal, block: int, *args: Any) -> Any:
        if block == stop:
            raise KeyboardInterrupt
        return commit(self, block, *args)

    monkeypatch.setattr(Journal, "commit", dying)
    with pytest.raises(KeyboardInterrupt):
        bh.prune(fresh(), method, batches, out=tmp_path / "killed", precision="highest")
    monkeypatch.undo()
    report = bh.prune(fresh(), method, batches, out=tmp_path / "killed", precision="highest")
    assert report.resumed == (stop > 0)
    one, other = (bh.load(str(tmp_path / name))[0] for name in ("whole", "killed"))
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name
