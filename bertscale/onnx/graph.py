"""The networks in a plain dense form, batches padded: what `torch.onnx` turns into a graph.

    graph = EncoderGraph(model.encoder, pooling="mean", normalize=True)
    graph(input_ids, attention_mask, token_type_ids)    # last_hidden_state, sentence_embedding

The native network lays samples end to end, by lengths that the host knows: a graph cannot have that. Here
the layers and their parameters are the native ones, and only attention is written again, over all pairs of a
padded batch. No shape is compiled in: batches and lengths are the inputs' own, positions are counted in the
graph.

Dimensions: B samples, L tokens of the longest, H hidden size, A attention heads, D head size, C outputs,
V vocabulary, N options of an example of multiple choice.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertscale.model.heads import OF_TOKENS, TaskModel
from bertscale.model.model import Attention, Embeddings, Encoder, Predictions

Pooling = Literal["mean", "first"]


class PaddedEncoder(nn.Module):
    """Ids [B, L], mask [B, L] and, where the network tells segments apart, token types -> [B, L, H].

    `embeddings`: those of another encoder, where `encoder` has none, as a generator.
    """

    def __init__(self, encoder: Encoder, embeddings: Embeddings | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.embeddings = encoder.embeddings if embeddings is None else embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        encoder, config = self.encoder, self.encoder.config
        positions = torch.arange(input_ids.shape[1])  # [L]
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        hidden: Tensor = self.embeddings(input_ids, types, positions)  # [B, L, H]
        if encoder.projection is not None:
            hidden = encoder.projection(hidden)
        attended = attention_mask[:, None, None, :] > 0  # [B, 1, 1, L]
        distance = (positions[:, None] - positions).abs()  # [L, L]
        # A padding token sees itself, so that a window without any token leaves no NaN behind.
        everywhere = attended | (distance == 0)
        nearby = attended & (distance <= config.half_window) | (distance == 0) if config.half_window else None
        for number, layer in enumerate(encoder.layers):
            local = config.is_local(number)
            angles = self.angles(positions, local=local) if config.rotary else None
            mask = nearby if local and nearby is not None else everywhere
            hidden = attention(layer.attention, hidden, mask, angles)  # type: ignore[arg-type]
            hidden = layer.feed_forward(hidden.flatten(0, 1)).view_as(hidden)  # type: ignore[operator]
        if config.pre_norm:
            hidden = encoder.LayerNorm(hidden)
        return hidden

    def angles(self, positions: Tensor, *, local: bool) -> Tensor:
        """Rotary angles (Su et al., 2021), float32 [L, D / 2], for any L."""
        config = self.encoder.config
        theta = config.local_rope_theta if local else config.global_rope_theta
        size = config.hidden_size // config.num_attention_heads
        frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        return positions[:, None].float() * frequencies


def attention(part: Attention, hidden: Tensor, mask: Tensor, angles: Tensor | None) -> Tensor:
    """What `Attention.forward` computes, of padded samples: [B, L, H] -> [B, L, H]; mask [B, 1, L, L]."""
    inputs = hidden if part.norm_after else part.LayerNorm(hidden)
    projected = part.query_key_value(inputs).unflatten(-1, (part.heads, 3, -1))  # [B, L, A, 3, D]
    query, key, value = projected.permute(3, 0, 2, 1, 4).unbind(0)  # 3 x [B, A, L, D]
    if angles is not None:
        query, key = rotated(query, angles), rotated(key, angles)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    output = hidden + part.dense(attended.transpose(1, 2).flatten(2))  # [B, A, L, D] -> [B, L, H]
    normed: Tensor = part.LayerNorm(output) if part.norm_after else output
    return normed


def rotated(values: Tensor, angles: Tensor) -> Tensor:
    """Rotates [B, A, L, D] by [L, D / 2]: feature d of the first half with d of the second."""
    first, second = values.chunk(2, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def pooled(hidden: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector of each sample, its mean over real tokens or its first one: [B, L, H] -> [B, H]."""
    if pooling == "first":
        return hidden[:, 0]
    real = attention_mask[:, :, None].to(hidden.dtype)
    return (hidden * real).sum(1) / real.sum(1).clamp(min=1e-9)


class EncoderGraph(nn.Module):
    """last_hidden_state [B, L, H] and, with `pooling`, sentence_embedding [B, H], of length 1 if asked."""

    def __init__(self, encoder: Encoder, pooling: Pooling | None = None, *, normalize: bool = False) -> None:
        super().__init__()
        self.encoder, self.pooling, self.normalize = PaddedEncoder(encoder), pooling, normalize

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)
        if self.pooling is None:
            return (hidden,)
        vectors = pooled(hidden, attention_mask, self.pooling)
        return hidden, F.normalize(vectors, dim=-1) if self.normalize else vectors


class MaskedGraph(nn.Module):
    """logits [B, L, V] of the masked tokens; padded rows of the vocabulary are cut off."""

    def __init__(self, encoder: PaddedEncoder, predictions: Predictions, vocab_size: int) -> None:
        super().__init__()
        self.encoder, self.predictions, self.vocab_size = encoder, predictions, vocab_size

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)
        logits = self.predictions.logits(hidden.flatten(0, 1))[:, : self.vocab_size]
        return (logits.view(*input_ids.shape, -1),)


class TaskGraph(nn.Module):
    """A task model: logits [B, C], of tokens [B, L, C]; of questions start_logits and end_logits [B, L].

    Of multiple choice inputs are [B, N, L] and logits [B, N].
    """

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.encoder, self.head, self.config = PaddedEncoder(model.encoder), model.head, model.head_config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        chooses = self.config.kind == "multiple_choice"
        shape = input_ids.shape
        if chooses:
            input_ids, attention_mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
            token_type_ids = None if token_type_ids is None else token_type_ids.flatten(0, 1)
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)
        if self.config.kind not in OF_TOKENS:
            hidden = self.vectors(hidden, attention_mask)
        logits = self.head(hidden)
        if self.config.kind == "question_answering":
            return tuple(logits.unbind(-1))
        return (logits.view(shape[:2]) if chooses else logits,)

    def vectors(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """What the head reads of each sample: [B, L, H] -> [B, H]."""
        pooler = self.encoder.encoder.pooler
        if pooler is not None:
            return torch.tanh(pooler(hidden[:, 0]))
        return pooled(hidden, attention_mask, "mean" if self.config.pooling == "mean" else "first")
