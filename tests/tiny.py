"""Tiny random models of real Transformers classes, their inputs, and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from billhook.anatomy import anatomy_of, sites_of

VOCABULARY = 96
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {**_LLAMA, "head_dim": 8}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
_BERT = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}

# family name -> (model class, configuration class, its options)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_LLAMA, "sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 8}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", {**_LLAMA, "num_key_value_heads": 4}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GEMMA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GEMMA, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GEMMA, "sliding_window": 8}),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _VIT),
}
TEXT_FAMILIES = [name for name in FAMILIES if name not in ("bert", "vit", "deit")]  # that write text
# other classes of a family: what reads the last hidden state differs
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-base": ("BertModel", "BertConfig", _BERT),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", {**_BERT, "num_labels": 5}),
    "bert-tagger": ("BertForTokenClassification", "BertConfig", {**_BERT, "num_labels": 5}),
    "llama-base": ("LlamaModel", "LlamaConfig", _LLAMA),
    "llama-classifier": ("LlamaForSequenceClassification", "LlamaConfig", {**_LLAMA, "num_labels": 5}),
    "vit-base": ("ViTModel", "ViTConfig", _VIT),
}


def build(family: str, seed: int = 0) -> nn.Module:
    """A tiny random model of a family (or another class of one), with weights of usable size, in evaluation mode."""
    cls, config, options = (FAMILIES | OTHERS)[family]
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, cls)(getattr(transformers, config)(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


def batches_for(family: str, count: int = 3, size: int = 2, seed: int = 1) -> list[torch.Tensor]:
    """Calibration batches that fit a family's input."""
    generator = torch.Generator().manual_seed(seed)
    if family.startswith(("vit", "deit")):
        return [torch.randn(size, 3, 32, 32, generator=generator) for _ in range(count)]
    return [torch.randint(3, VOCABULARY, (size, 24), generator=generator) for _ in range(count)]


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def site_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Site name -> weight [out, in], whatever the layer's layout."""
    return {site.name: site.weight.clone() for block in sites_of(model, anatomy_of(model)) for site in block}


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words w0 ... w95 to their numbers."""
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def write_text(path: Path, words: int = 4000, seed: int = 0) -> Path:
    """A text file of random words in paragraphs."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(3, VOCABULARY, (words,), generator=generator).tolist()
    lines = [" ".join(f"w{n}" for n in numbers[i : i + 40]) for i in range(0, words, 40)]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path
