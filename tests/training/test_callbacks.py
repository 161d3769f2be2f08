"""Pruning inside Trainer and Lightning: the same masks as in a plain loop, and resume from their checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import billhook as bh
from billhook.errors import BillhookError
from billhook.training.state import load_state, save_state

STEPS = 12


class Tokens(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8
        )
    )


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="steps",
        save_steps=5,
        logging_strategy="no",
        **more,
    )


def fit(folder: Path, resume: str | None = None) -> tuple[LlamaForCausalLM, bh.PruneCallback]:
    model = llama()
    callback = bh.PruneCallback(bh.GraNet(sparsity=0.75, update_every=1))
    trainer = Trainer(model, arguments(folder), train_dataset=Tokens(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return model, callback


def test_trainer_prunes_and_resumes(tmp_path: Path) -> None:
    model, callback = fit(tmp_path)
    assert callback.pruner is not None
    assert callback.pruner.sparsity == pytest.approx(0.75, abs=1e-3)
    for name, mask in callback.pruner.masks.items():
        assert not bool(model.get_parameter(name).detach()[~mask].any())
    again, second = fit(tmp_path, str(tmp_path / "checkpoint-5"))
    assert second.pruner is not None
    for name, mask in callback.pruner.masks.items():
        assert torch.equal(mask, second.pruner.masks[name])
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_state_files(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    pruner = bh.GMP(sparsity=0.5).attach(model, torch.optim.SGD(model.parameters(), lr=0.1), STEPS)
    pruner.memory["kept"] = torch.arange(3.0)
    state = pruner.state_dict()
    save_state(state, tmp_path / "state.safetensors")
    read = load_state(tmp_path / "state.safetensors")
    assert read.keys() == state.keys()
    pruner.load_state_dict(read)
    assert torch.equal(pruner.memory["kept"], torch.arange(3.0))
    with pytest.raises(BillhookError, match="There is no pruner state"):
        load_state(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 30)
    with pytest.raises(BillhookError, match="not a pruner's state"):
        load_state(tmp_path / "bad.safetensors")


def test_a_callback_outside_a_training() -> None:
    with pytest.raises(BillhookError, match="give it to the Trainer"):
        bh.PruneCallback(bh.GMP()).on_optimizer_step(None, None, None)


def test_lightning_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "billhook.training.lightning", raising=False)
    with pytest.raises(BillhookError, match=r"pip install 'billhook\[lightning\]'"):
        import billhook.training.lightning  # noqa: F401


def test_lightning_prunes_and_resumes(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import ModelCheckpoint

    from billhook.training.lightning import PruneCallback

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    g = torch.Generator().manual_seed(0)
    data = list(zip(torch.randn(48, 6, generator=g), torch.randint(0, 3, (48,), generator=g), strict=True))

    def run(checkpoint: str | None = None) -> tuple[Any, Any, Any]:
        module, callback = Module(), PruneCallback(bh.RigL(sparsity=0.6, update_every=1))
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = lightning.Trainer(
            max_steps=STEPS,
            accumulate_grad_batches=2,
            callbacks=[callback, saver],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, DataLoader(data, batch_size=6), ckpt_path=checkpoint)  # type: ignore[arg-type]
        return module, callback, trainer

    module, callback, trainer = run()  # 8 batches, 4 steps an epoch
    assert callback.pruner.taken == trainer.global_step == STEPS
    assert callback.pruner.sparsity == pytest.approx(0.6, abs=0.02)
    again, second, _ = run(checkpoint=str(tmp_path / "step=4.ckpt"))
    assert all(torch.equal(mask, second.pruner.masks[name]) for name, mask in callback.pruner.masks.items())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    zeros = [int((p == 0).sum()) for n, p in module.named_parameters() if p.ndim == 2]
    assert sum(zeros) >= callback.pruner.total - callback.pruner.active
