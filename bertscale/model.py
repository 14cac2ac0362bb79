"""The encoder family and its heads, as single-device text: layers that may be sharded come from `layers`.

Preset `bert`: post-LayerNorm, GELU, learned positions, token types, pooler, tied decoder (Devlin et al.,
2019), numerically equal to transformers' BertForPreTraining from the same weights.

Samples are laid end to end without padding. Dimensions:
    T tokens of the micro-batch   S samples   P masked positions   L tokens of one sample
    H hidden size   A attention heads on this rank   D head size   V vocabulary on this rank
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertscale.config import ModelConfig
from bertscale.kernels import Packing, attend
from bertscale.layers import Embedding, Layers, Linear, derive_seed

VOCAB_MULTIPLE = 128  # rows of the word embedding: a multiple that tensor parallel and tensor cores like


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the word embedding; the rows past `vocab_size` are never predicted nor exported."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Embeddings(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int, layers: Layers) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = layers.word_embedding(padded_vocab_size(vocab_size), width)
        self.position_embeddings = Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, tokens: Tensor, token_types: Tensor, positions: Tensor) -> Tensor:
        hidden = self.word_embeddings(tokens) + self.token_type_embeddings(token_types)  # [T, H]
        hidden = hidden + self.position_embeddings(positions)
        dropped: Tensor = self.dropout(self.LayerNorm(hidden))
        return dropped


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.layers = layers
        self.heads = config.num_attention_heads // layers.degree
        # Rows in the order head, (query, key, value), feature: a share of rows is a share of heads.
        self.query_key_value = layers.column(config.hidden_size, 3 * config.hidden_size)
        self.dense = layers.row(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.probs_dropout = config.attention_probs_dropout_prob

    def forward(self, hidden: Tensor, packing: Packing) -> Tensor:
        projected = self.query_key_value(hidden)  # [T, H] -> [T, A 3 D]
        projected = projected.view(hidden.shape[0], self.heads, 3, -1)  # -> [T, A, 3, D]
        with self.layers.sharded_random():  # each rank has other heads
            attended = attend(projected, packing, self.probs_dropout if self.training else 0.0)
        output: Tensor = self.dropout(self.dense(attended.flatten(1)))  # [T, A, D] -> [T, H]
        normed: Tensor = self.LayerNorm(output + hidden)
        return normed


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.intermediate = layers.column(config.hidden_size, config.intermediate_size)
        self.dense = layers.row(config.intermediate_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.dropout(self.dense(F.gelu(self.intermediate(hidden))))
        normed: Tensor = self.LayerNorm(output + hidden)
        return normed


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.attention = Attention(config, layers)
        self.feed_forward = FeedForward(config, layers)

    def forward(self, hidden: Tensor, packing: Packing) -> Tensor:
        attended: Tensor = self.feed_forward(self.attention(hidden, packing))
        return attended


class Encoder(nn.Module):
    """Tokens laid end to end -> hidden states."""

    def __init__(self, config: ModelConfig, vocab_size: int, layers: Layers) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, vocab_size, layers)
        self.layers = nn.ModuleList(Layer(config, layers) for _ in range(config.num_hidden_layers))
        self.pooler = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, tokens: Tensor, token_types: Tensor, positions: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Ids [T] each and S lengths -> hidden states [T, H], pooled first tokens [S, H]."""
        packing = Packing.of(lengths, tokens.device)
        hidden = self.embeddings(tokens, token_types, positions)
        for layer in self.layers:
            hidden = layer(hidden, packing)
        first = hidden.index_select(0, packing.starts[:-1])  # [T, H] -> [S, H]
        return hidden, torch.tanh(self.pooler(first))


class Predictions(nn.Module):
    """Hidden states at masked positions -> logits over the vocabulary."""

    def __init__(self, config: ModelConfig, vocab_size: int, layers: Layers) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        padded = padded_vocab_size(vocab_size)
        self.decoder = layers.tied_decoder(padded, config.hidden_size)
        here = padded // layers.degree
        self.real = max(0, min(vocab_size - layers.rank * here, here))  # rows here that are pieces
        self.rows = here

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.LayerNorm(F.gelu(self.dense(hidden))))  # [P, H] -> [P, V]
        if self.real < self.rows:
            logits[:, self.real :] = torch.finfo(logits.dtype).min
        return logits


class PretrainingModel(nn.Module):
    """Encoder with the masked-language head and that of sentence pairs (next sentence or order).

    `vocab_size` is the tokenizer's; the word embedding has `padded_vocab_size` rows.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, layers: Layers | None = None) -> None:
        super().__init__()
        layers = layers or Layers()
        self.config, self.vocab_size, self.parallel = config, vocab_size, layers
        self.encoder = Encoder(config, vocab_size, layers)
        self.predictions = Predictions(config, vocab_size, layers)
        self.predictions.decoder.weight = self.encoder.embeddings.word_embeddings.weight
        self.seq_relationship = Linear(config.hidden_size, 2)

    def forward(
        self,
        tokens: Tensor,
        token_types: Tensor,
        positions: Tensor,
        lengths: Sequence[int],
        target_positions: Tensor,
        targets: Tensor,
        next_sentence_label: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over the micro-batch, float32 scalars: masked-language loss over P positions, the pairs'
        loss over S samples, and how many of each were predicted right. Without labels a sample is no pair
        and may hold several sequences, each with a length of its own; the pairs' sums are 0.

        The projection to the vocabulary runs on the P masked positions only.
        """
        hidden, pooled = self.encoder(tokens, token_types, positions, lengths)
        logits = self.predictions(F.embedding(target_positions, hidden))  # [P, V]
        masked_correct = self.parallel.correct(logits, targets)
        masked_loss = self.parallel.cross_entropy(logits, targets).sum()
        if next_sentence_label is None:
            # Zero, but of every weight: the sharded optimizers wait for the gradients of all of them.
            nothing = 0.0 * self.seq_relationship(pooled[:1]).float().sum()
            return masked_loss, nothing, masked_correct, torch.zeros_like(masked_correct)
        relation = self.seq_relationship(pooled).float()  # [S, 2]
        relation_loss = F.cross_entropy(relation, next_sentence_label, reduction="sum")
        relation_correct = (relation.detach().argmax(dim=-1) == next_sentence_label).sum().float()
        return masked_loss, relation_loss, masked_correct, relation_correct


class ClassificationModel(nn.Module):
    """Encoder with a linear classifier on one vector a sample.

    `pooling` is `first`, BERT's own (a dense layer and tanh on the first token), or `mean`: the mean of the
    sample's hidden states (Reimers and Gurevych, 2019), each feature standardised (batch normalisation
    without weights), since what all samples share is most of such a mean and hides where they differ.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, classes: int, pooling: str = "first") -> None:
        super().__init__()
        self.config, self.vocab_size, self.pooling = config, vocab_size, pooling
        self.encoder = Encoder(config, vocab_size, Layers())
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.standardize = nn.BatchNorm1d(config.hidden_size, affine=False)
        self.classifier = Linear(config.hidden_size, classes)

    def forward(
        self, tokens: Tensor, token_types: Tensor, positions: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """Ids [T] each and S lengths -> logits, float32 [S, classes]."""
        return self.classify(self.features(tokens, token_types, positions, lengths))

    def features(
        self, tokens: Tensor, token_types: Tensor, positions: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """Ids [T] each and S lengths -> one vector a sample [S, H], before it is standardised."""
        hidden, pooled = self.encoder(tokens, token_types, positions, lengths)
        if self.pooling == "first":
            return pooled  # type: ignore[no-any-return]
        return torch.stack([part.mean(dim=0) for part in torch.split(hidden, list(lengths))])

    def classify(self, features: Tensor) -> Tensor:
        """[S, H] -> logits, float32 [S, classes]."""
        if self.pooling == "mean":
            features = self.standardize(features.float())
        logits: Tensor = self.classifier(self.dropout(features))
        return logits.float()


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, vocab_size: int, seed: int) -> Tensor:
    """The whole first value (float32, CPU) of the parameter `name` of global `shape`.

    | parameter                       | value                            |
    | ------------------------------- | -------------------------------- |
    | biases                          | 0                                |
    | LayerNorm weights               | 1                                |
    | embeddings                      | normal(0, initializer_range)     |
    | matrices                        | normal(0, initializer_range or   |
    |                                 | matrix_initializer_range if set) |
    | padded rows of the vocabulary   | 0, and they stay 0               |

    (Devlin et al., 2019, drew matrices truncated at two deviations; transformers draws them
    untruncated, as here.) It depends on name, shape and seed alone, so that every topology
    starts from the same weights.
    """
    if name.endswith("bias"):
        return torch.zeros(*shape)
    if "LayerNorm" in name:
        return torch.ones(*shape)
    generator = torch.Generator().manual_seed(derive_seed(seed, name))
    deviation = config.initializer_range
    if "embeddings" not in name:
        deviation = config.matrix_initializer_range or deviation
    value = torch.empty(*shape).normal_(0.0, deviation, generator=generator)
    if name.endswith("word_embeddings.weight"):
        value[vocab_size:] = 0.0
    return value


def model_flops_per_token(config: ModelConfig, vocab_size: int, attended: float, masked: float) -> float:
    """Model FLOPs of one training step for one real token (forward and backward, nothing recomputed).

    `attended` is the mean number of tokens that a token attends to, `masked` the share of
    predicted tokens: 6 (12 l h^2) + 12 l h a + 6 m (h^2 + h V), with the feed-forward part
    counted at its real width.
    """
    width, depth = config.hidden_size, config.num_hidden_layers
    layer = 4 * width**2 + 2 * width * config.intermediate_size
    head = width**2 + width * vocab_size
    return 6 * depth * layer + 12 * depth * width * attended + 6 * masked * head
