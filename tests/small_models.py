"""Small models of transformers with random weights, and inputs for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from grid import DEVICE
from torch import Tensor

BATCH, LENGTH, VOCABULARY = 3, 24, 96
SIZES = {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
DECODER = {
    **SIZES, **HEADS, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "max_position_embeddings": 64, "attention_dropout": 0.0, "initializer_range": 0.1,
}  # fmt: skip
WINDOW = {**DECODER, "sliding_window": 7}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    "qwen": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**DECODER, head_dim=64)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**WINDOW)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **WINDOW, head_dim=64, attn_logit_softcapping=2.0, query_pre_attn_scalar=64
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(
            **SIZES, **HEADS, vocab_size=VOCABULARY, max_position_embeddings=64,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
        )
    ),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(  # windows that look both ways
        transformers.ModernBertConfig(
            **SIZES, **HEADS, vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0,
            local_attention=8, global_attn_every_n_layers=2, initializer_range=0.1,
        )
    ),
    "bart": lambda: transformers.BartModel(  # attention of a decoder to an encoder
        transformers.BartConfig(
            d_model=256, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, dropout=0.0,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0,
            vocab_size=VOCABULARY, max_position_embeddings=64, init_std=0.1,
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**SIZES, **HEADS, image_size=32, patch_size=8, num_labels=5)
    ),
}  # fmt: skip


@functools.lru_cache(maxsize=32)
def made(model: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(1)
    return MODELS[model]().to(DEVICE, dtype).eval()


def inputs(model: str, padding: str | None, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(2)
    if model == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 32, 32, device=DEVICE).to(dtype)}
    given = {"input_ids": torch.randint(0, VOCABULARY, (BATCH, LENGTH), device=DEVICE)}
    if padding is not None:
        given["attention_mask"] = padded(padding)
    if model == "bart":
        given["decoder_input_ids"] = given["input_ids"][:, :9]
    return given


def padded(side: str) -> Tensor:
    """One row without padding, one with a little, one with much."""
    places = torch.arange(LENGTH, device=DEVICE)
    hidden = torch.tensor([0, 2, 9], device=DEVICE)[:, None]
    if side == "left":
        return (places >= hidden).long()
    right = (places < LENGTH - hidden).long()
    return right if side == "right" else right * (places >= 3)
