"""Small models of many architectures, with random weights, for tests and benchmarks; those of transformers from a configuration only.

Every function returns a model and example inputs by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Case = tuple[nn.Module, dict[str, Any]]


def _images(size: int, batch: int = 2) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def _words(length: int = 8, vocabulary: int = 96, batch: int = 2) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, vocabulary, (batch, length))}


def gpt2(layers: int = 2, width: int = 32, heads: int = 4, inner: int | None = None, vocabulary: int = 96,
         positions: int = 16, dropout: float = 0.0) -> Case:  # fmt: skip
    """GPT-2: its linear layers hold transposed weights (Conv1D), query, key and value in one; the head is tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads, n_inner=inner,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), _words(min(8, positions), vocabulary)


def bert(dropout: float = 0.0) -> Case:
    """BERT with a padding mask and a classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForSequenceClassification(config), {**_words(), "attention_mask": torch.ones(2, 8, dtype=torch.long)}


def llama() -> Case:
    """LLaMA: rotary positions fix the width of a head, queries share keys, the activation is gated, norms are written out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), _words()


def vit() -> Case:
    """Vision transformer: class token and positions are bare parameters."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config), _images(16)


def resnet() -> Case:
    """ResNet with basic blocks."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic")
    return ResNetForImageClassification(config), _images(32)


def mobilenet_v2() -> Case:
    """MobileNetV2: inverted bottlenecks with depthwise convolutions."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, classifier_dropout_prob=0.0)
    return MobileNetV2ForImageClassification(config), _images(32)


def mobilevit() -> Case:
    """MobileViT: convolutions and attention over unfolded patches in one network."""
    from transformers import MobileViTConfig, MobileViTForImageClassification

    config = MobileViTConfig(
        image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64], num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0,
    )  # fmt: skip
    return MobileViTForImageClassification(config), _images(64)


def convnext() -> Case:
    """ConvNeXt: depthwise 7x7, layer scale, channels last."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, image_size=32, drop_path_rate=0.0)
    return ConvNextForImageClassification(config), _images(32)


class _Encoder(nn.Module):
    """torch's own transformer encoder between two linear layers; its input projection is a bare parameter."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=batch_first)
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.encoder(self.first(x)))
        return logits


def encoder() -> Case:
    """nn.TransformerEncoder."""
    return _Encoder(), {"x": torch.randn(2, 5, 8)}


class _Attending(nn.Module):
    """nn.MultiheadAttention that returns its weights: products and softmax written out, heads in the batch; called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 3)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.first(x)
        for _ in range(2):
            y, weights = self.attention(x, x, x)
            x = x + y
        return self.last(x), weights


def multihead_attention() -> Case:
    """nn.MultiheadAttention, called twice."""
    return _Attending(), {"x": torch.randn(2, 5, 8)}


class _ResNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.reduce = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 1, bias=False)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=8, bias=False)
        self.expand, self.norm = nn.Conv2d(32, 32, 1, bias=False), nn.GroupNorm(4, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = x + self.norm(self.expand(F.relu(self.grouped(F.relu(self.reduce(x))))))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def resnext() -> Case:
    """A block of ResNeXt: a grouped convolution between two of 1x1, group norm."""
    return _ResNeXt(), {"x": torch.randn(2, 3, 8, 8)}


_BUILDERS = (
    resnet, resnext, mobilenet_v2, mobilevit, convnext, vit, bert, gpt2, llama, encoder, multihead_attention,
)  # fmt: skip
ARCHITECTURES: dict[str, Callable[[], Case]] = {build.__name__: build for build in _BUILDERS}
"""All of them by name."""


def _published(model: str, configuration: str, inputs: Callable[[], dict[str, Any]], **options: Any) -> Case:
    """A model of transformers with its configuration's own sizes, on the meta device: sizes only, no numbers."""
    import transformers

    config = getattr(transformers, configuration)(**options)
    with torch.device("meta"):
        return getattr(transformers, model)(config), inputs()


PUBLISHED: dict[str, Callable[[], Case]] = {
    "resnet50": lambda: _published(
        "ResNetForImageClassification", "ResNetConfig", lambda: _images(224, 1), num_labels=1000
    ),
    "mobilenet_v2": lambda: _published(
        "MobileNetV2ForImageClassification", "MobileNetV2Config", lambda: _images(224, 1), num_labels=1001
    ),
    "convnext_tiny": lambda: _published(
        "ConvNextForImageClassification", "ConvNextConfig", lambda: _images(224, 1), num_labels=1000
    ),
    "mobilevit_small": lambda: _published(
        "MobileViTForImageClassification", "MobileViTConfig", lambda: _images(256, 1), num_labels=1000
    ),
    "vit_base": lambda: _published("ViTForImageClassification", "ViTConfig", lambda: _images(224, 1), num_labels=1000),
    "bert_base": lambda: _published("BertForSequenceClassification", "BertConfig", lambda: _words(512, 30522, 1)),
    "gpt2_small": lambda: _published("GPT2LMHeadModel", "GPT2Config", lambda: _words(1024, 50257, 1), use_cache=False),
    "llama_160m": lambda: _published(
        "LlamaForCausalLM",
        "LlamaConfig",
        lambda: _words(1024, 32000, 1),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        use_cache=False,
    ),
}
"""Architectures at the sizes they were published with, on the meta device; to plan rewrites of."""
