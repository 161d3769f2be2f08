"""The families that billhook knows, one declaration each."""

from __future__ import annotations

from billhook.anatomy.anatomy import MLP, Anatomy, Attention, declare

_LLAMA_ATTENTION = Attention(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    query_norm="q_norm",
    key_norm="k_norm",
)
_LLAMA_MLP = MLP(inputs=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj", gated=True)
_PRE_POST = ("input_layernorm", "post_attention_layernorm")

declare(
    Anatomy(
        family="llama",
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        blocks="model.layers",
        attention=_LLAMA_ATTENTION,
        mlp=_LLAMA_MLP,
        embeddings=("model.embed_tokens",),
        norms=_PRE_POST,
        final_norm="model.norm",
        head="lm_head",
    )
)

declare(
    Anatomy(
        family="gemma",
        norm_plus_one=True,
        model_types=("gemma",),
        blocks="model.layers",
        attention=_LLAMA_ATTENTION,
        mlp=_LLAMA_MLP,
        embeddings=("model.embed_tokens",),
        norms=_PRE_POST,
        final_norm="model.norm",
        head="lm_head",
    )
)

declare(
    Anatomy(
        family="gemma2",
        norm_plus_one=True,
        model_types=("gemma2", "gemma3_text"),
        blocks="model.layers",
        attention=_LLAMA_ATTENTION,
        mlp=_LLAMA_MLP,
        embeddings=("model.embed_tokens",),
        norms=(*_PRE_POST, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        layout="sandwich",
        final_norm="model.norm",
        head="lm_head",
    )
)

declare(
    Anatomy(
        family="phi3",
        model_types=("phi3",),
        blocks="model.layers",
        attention=Attention(fused="self_attn.qkv_proj", output="self_attn.o_proj"),
        mlp=MLP(inputs=("mlp.gate_up_proj",), output="mlp.down_proj", gated=True, activation="mlp.activation_fn"),
        dropout="resid_mlp_dropout",
        embeddings=("model.embed_tokens",),
        norms=_PRE_POST,
        final_norm="model.norm",
        head="lm_head",
    )
)

declare(
    Anatomy(
        family="phi",
        model_types=("phi",),
        blocks="model.layers",
        attention=Attention(
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            output="self_attn.dense",
            query_norm="q_layernorm",
            key_norm="k_layernorm",
        ),
        mlp=MLP(inputs=("mlp.fc1",), output="mlp.fc2", activation="mlp.activation_fn"),
        layout="parallel",
        dropout="resid_dropout",
        embeddings=("model.embed_tokens",),
        norms=("input_layernorm",),
        final_norm="model.final_layernorm",
        head="lm_head",
        norm="layer",
        bias=True,
    )
)

declare(
    Anatomy(
        family="opt",
        model_types=("opt",),
        blocks="model.decoder.layers",
        attention=Attention(
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            output="self_attn.out_proj",
            rotary=False,
        ),
        mlp=MLP(inputs=("fc1",), output="fc2", activation="activation_fn", width="ffn_dim"),
        layout_switch=("do_layer_norm_before", "post"),
        dropout="dropout",
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        final_norm="model.decoder.final_layer_norm",
        head="lm_head",
        norm="layer",
        bias=True,
    )
)

declare(
    Anatomy(
        family="gpt2",
        model_types=("gpt2",),
        blocks="transformer.h",
        attention=Attention(fused="attn.c_attn", output="attn.c_proj", rotary=False),
        mlp=MLP(inputs=("mlp.c_fc",), output="mlp.c_proj", activation="mlp.act", width="n_inner"),
        dropout="mlp.dropout",
        embeddings=("transformer.wte", "transformer.wpe"),
        norms=("ln_1", "ln_2"),
        final_norm="transformer.ln_f",
        head="lm_head",
        norm="layer",
        bias=True,
        conv1d=True,
        same_ends=True,
    )
)

declare(
    Anatomy(
        family="gpt_neox",
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        attention=Attention(fused="attention.query_key_value", fused_layout="per-head", output="attention.dense"),
        mlp=MLP(inputs=("mlp.dense_h_to_4h",), output="mlp.dense_4h_to_h", activation="mlp.act"),
        layout="parallel",
        layout_switch=("use_parallel_residual", "sequential"),
        dropout="post_mlp_dropout",
        embeddings=("gpt_neox.embed_in",),
        norms=_PRE_POST,
        final_norm="gpt_neox.final_layer_norm",
        head="lm_head",
        norm="layer",
        bias=True,
    )
)

declare(
    Anatomy(
        family="bert",
        model_types=("bert",),
        blocks="bert.encoder.layer",
        attention=Attention(
            query="attention.self.query",
            key="attention.self.key",
            value="attention.self.value",
            output="attention.output.dense",
            rotary=False,
        ),
        mlp=MLP(inputs=("intermediate.dense",), output="output.dense", activation="intermediate.intermediate_act_fn"),
        layout="post",
        dropout="output.dropout",
        embeddings=("bert.embeddings",),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        head="cls.predictions.decoder",
        readers=("bert.pooler.dense", "cls.predictions.transform.dense"),
        transform="cls.predictions.transform",
        norm="layer",
        bias=True,
    )
)

for _kind in ("vit", "deit"):
    declare(
        Anatomy(
            family=_kind,
            model_types=(_kind,),
            blocks=f"{_kind}.layers",
            attention=Attention(
                query="attention.q_proj",
                key="attention.k_proj",
                value="attention.v_proj",
                output="attention.o_proj",
                rotary=False,
            ),
            mlp=MLP(inputs=("mlp.fc1",), output="mlp.fc2", activation="mlp.activation_fn"),
            dropout="dropout",
            embeddings=(f"{_kind}.embeddings",),
            norms=("layernorm_before", "layernorm_after"),
            final_norm=f"{_kind}.layernorm",
            head="classifier",
            readers=(f"{_kind}.pooler.dense",),
            norm="layer",
            bias=True,
            input="pixel_values",
        )
    )
