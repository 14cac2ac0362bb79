"""The encoder family and its heads, as single-device text: layers that may be sharded come from `layers`.

Each preset is numerically equal to its transformers class from the same weights:

| preset        | class                      | norms | positions            | feed-forward | biases  |
| ------------- | -------------------------- | ----- | -------------------- | ------------ | ------- |
| bert          | BertForPreTraining         | after | learned              | GELU         | yes     |
| megatron-bert | MegatronBertForPreTraining | first | learned              | GELU         | yes     |
| modern        | ModernBertForMaskedLM      | first | rotary, local layers | GELU, gated  | decoder |

(Devlin et al., 2019; Shoeybi et al., 2019; Warner et al., 2024.) With a generator, for replaced-token
detection (ELECTRA: Clark et al., 2020), `bert` is ElectraForPreTraining and ElectraForMaskedLM. Parameters
have the same names in all three, so that one table says which of them tensor parallel shards.

Samples are laid end to end without padding. Dimensions:
    T tokens of the micro-batch   S samples   P predicted positions   L tokens of one sample
    H hidden size   A attention heads on this rank   D head size   V vocabulary on this rank
    G groups of feed-forward features on this rank   I features of a group
A position is a token's in its sequence, but target_positions are indices in the micro-batch's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertscale.config import ModelConfig, padded_vocab_size
from bertscale.data.micro_batch import MicroBatch
from bertscale.model.decoder import TiedDecoder
from bertscale.model.kernels import Packing, Rotation, attend, rotate, rotation
from bertscale.model.layers import Embedding, Layers, Linear, derive_seed

GRAPH_SIZES = 16  # numbers of tokens at most that CUDA graphs are recorded for


class Embeddings(nn.Module):
    """Ids [T] -> hidden states [T, H], by word and, without rotary positions, token type and position."""

    def __init__(self, config: ModelConfig, vocab_size: int, layers: Layers) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = layers.word_embedding(padded_vocab_size(vocab_size), width)
        self.rotary = config.rotary
        if not self.rotary:
            self.position_embeddings = Embedding(config.max_position_embeddings, width)
            self.token_type_embeddings = Embedding(config.type_vocab_size, width)
        self.LayerNorm: nn.Module | None = None
        if config.embedding_norm:
            self.LayerNorm = nn.LayerNorm(width, config.layer_norm_eps, bias=config.biases)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, tokens: Tensor, token_types: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = self.word_embeddings(tokens)  # [T, H]
        if not self.rotary:
            hidden = hidden + self.token_type_embeddings(token_types)
            hidden = hidden + self.position_embeddings(positions)
        if self.LayerNorm is not None:
            hidden = self.LayerNorm(hidden)
        dropped: Tensor = self.dropout(hidden)
        return dropped


class Attention(nn.Module):
    """Self-attention with its norm and its residual connection; `number` is the layer's, from 0."""

    def __init__(self, config: ModelConfig, layers: Layers, number: int, recompute: bool) -> None:
        super().__init__()
        self.layers, self.recompute = layers, recompute
        self.heads = config.num_attention_heads // layers.degree
        self.query_key_value = layers.column(config.hidden_size, 3 * config.hidden_size, config.biases)
        self.dense = layers.row(config.hidden_size, config.hidden_size, config.biases)
        self.norm_after = not config.pre_norm
        self.LayerNorm: nn.Module
        if config.pre_norm and config.embedding_norm and number == 0:  # the embeddings are normed just before
            self.LayerNorm = nn.Identity()
        else:
            self.LayerNorm = layers.norm(config.hidden_size, config.layer_norm_eps, config.biases)
        self.probs_dropout = config.attention_probs_dropout_prob
        self.dropout = nn.Dropout(self.probs_dropout if config.gated else config.hidden_dropout_prob)
        self.half_window = config.half_window if config.is_local(number) else None

    def forward(self, hidden: Tensor, packing: Packing, rotary: Rotation | None) -> Tensor:
        inputs = hidden if self.norm_after else self.LayerNorm(hidden)
        projected = self.query_key_value(inputs)  # [T, H] -> [T, A 3 D]
        projected = projected.view(projected.shape[0], self.heads, 3, -1)  # -> [T, A, 3, D]
        if rotary is not None:
            projected = rotate(projected, rotary)
        if self.recompute and self.training:
            attended = self.layers.checkpoint(self.attend, projected, packing)
        else:
            attended = self.attend(projected, packing)
        output = self.dense(attended.flatten(1))  # [T, A, D] -> [T, H]
        with self.layers.residual_random():
            output = hidden + self.dropout(output)
        normed: Tensor = self.LayerNorm(output) if self.norm_after else output
        return normed

    def attend(self, projected: Tensor, packing: Packing) -> Tensor:
        """Attention without its projections, which `recompute` repeats: [T, A, 3, D] -> [T, A, D]."""
        with self.layers.sharded_random():  # each rank has other heads
            dropout = self.probs_dropout if self.training else 0.0
            return attend(projected, packing, dropout, self.half_window)


class FeedForward(nn.Module):
    """Two dense layers with a norm and a residual connection. Gated: GeGLU (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.layers = layers
        width, inside = config.hidden_size, config.intermediate_size
        self.gated = config.gated
        self.groups = feed_forward_groups(config) // layers.degree
        self.intermediate = layers.column(width, 2 * inside if self.gated else inside, config.biases)
        self.dense = layers.row(inside, width, config.biases)
        self.norm_after = not config.pre_norm
        self.LayerNorm = layers.norm(width, config.layer_norm_eps, config.biases)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor) -> Tensor:
        inputs = hidden if self.norm_after else self.LayerNorm(hidden)
        inside = self.intermediate(inputs)  # [T, H] -> [T, features here], or gated twice as many
        if self.gated:
            value, gate = inside.view(inside.shape[0], self.groups, 2, -1).unbind(2)  # -> 2 x [T, G, I]
            inside = (F.gelu(value) * gate).flatten(1)  # [T, G, I] -> [T, G I]
            with self.layers.sharded_random():  # each rank has other features
                inside = self.dropout(inside)
            gated: Tensor = hidden + self.dense(inside)
            return gated
        output = self.dense(F.gelu(inside))
        with self.layers.residual_random():
            output = hidden + self.dropout(output)
        normed: Tensor = self.LayerNorm(output) if self.norm_after else output
        return normed


def feed_forward_groups(config: ModelConfig) -> int:
    """Groups of features that the gated feed-forward part can be sharded by."""
    return math.gcd(config.num_attention_heads, config.intermediate_size)


def fused_rows(name: str, config: ModelConfig) -> tuple[int, int]:
    """Returns (groups, matrices) of the weight or bias `name`, whose rows are ordered group, matrix, feature.

    One product computes all of them, and a share of the rows is a share of each of the matrices, for any
    number of tensor-parallel ranks that divides the groups:

    | parameter                       | groups                | matrices          |
    | ------------------------------- | --------------------- | ----------------- |
    | attention.query_key_value       | attention heads       | query, key, value |
    | feed_forward.intermediate gated | `feed_forward_groups` | input, gate       |
    | any other                       | 1                     | itself            |
    """
    owner = config.generator if name.startswith("generator.") else config
    assert owner is not None
    if "attention.query_key_value." in name:
        return owner.num_attention_heads, 3
    if owner.gated and "feed_forward.intermediate." in name:
        return feed_forward_groups(owner), 2
    return 1, 1


def split_fused(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    """The matrices of the whole parameter `name`, one after another: [rows, ...] -> [matrices, rows, ...]."""
    groups, matrices = fused_rows(name, config)
    rows = value.reshape(groups, matrices, -1, *value.shape[1:])  # [group, matrix, feature, ...]
    return rows.transpose(0, 1).reshape(matrices, -1, *value.shape[1:])


def join_fused(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of `split_fused`: [matrices, rows, ...] -> [rows, ...]."""
    groups, matrices = fused_rows(name, config)
    rows = value.reshape(matrices, groups, -1, *value.shape[2:])  # [matrix, group, feature, ...]
    return rows.transpose(0, 1).reshape(-1, *value.shape[2:])


class Layer(nn.Module):
    """One layer of the encoder, [T, H] -> [T, H]: attention, then feed-forward."""

    def __init__(self, config: ModelConfig, layers: Layers, number: int, recompute: bool) -> None:
        super().__init__()
        self.attention = Attention(config, layers, number, recompute)
        self.feed_forward = FeedForward(config, layers)

    def forward(self, hidden: Tensor, packing: Packing, rotary: Rotation | None) -> Tensor:
        attended: Tensor = self.feed_forward(self.attention(hidden, packing, rotary))
        return attended


class Encoder(nn.Module):
    """Tokens laid end to end -> hidden states, and with `pooler` a vector for each sample.

    `recompute`: what the backward pass computes again: `none`, `selective` (attention) or `full` (layers).
    With `width` it has no embeddings: each pass is given those of another encoder, `width` features wide.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        layers: Layers,
        pooler: bool,
        recompute: str = "none",
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.parallel, self.recompute = config, layers, recompute == "full"
        self.token_multiple, self.graphs = layers.token_multiple, False
        self.embeddings: Embeddings
        if width is None:
            self.embeddings = Embeddings(config, vocab_size, layers)
        projects = width not in (None, config.hidden_size)
        self.projection = Linear(width or 0, config.hidden_size) if projects else None
        self.layers = nn.ModuleList(
            Layer(config, layers, number, recompute == "selective")
            for number in range(config.num_hidden_layers)
        )
        if config.pre_norm:
            self.LayerNorm = layers.norm(config.hidden_size, config.layer_norm_eps, config.biases)
        self.pooler = Linear(config.hidden_size, config.hidden_size) if pooler else None

    def forward(
        self,
        tokens: Tensor,
        token_types: Tensor,
        positions: Tensor,
        lengths: Sequence[int],
        embeddings: Embeddings | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Ids [T] each and S lengths -> hidden states [T, H], pooled first tokens [S, H] or None.

        `embeddings`: those of another encoder, where this one has none. `causal`: no token sees those behind
        it, in any layer.
        """
        embed = self.embeddings if embeddings is None else embeddings
        count, samples, longest = len(tokens), len(lengths), max(lengths)
        # Tokens for a multiple of ranks, or a size with a recorded graph: samples whose results nobody uses.
        if extra := -count % self.token_multiple:
            tokens, token_types, positions = (
                F.pad(ids, (0, extra)) for ids in (tokens, token_types, positions)
            )
            rest = extra % longest  # none longer than the longest: positions and shapes stay in bounds
            lengths = [*lengths, *[longest] * (extra // longest), *[rest] * (rest > 0)]
        packing = Packing.of(lengths, tokens.device, few_shapes=self.graphs, causal=causal)
        rotaries = self.rotations(positions)
        embedded = embed(tokens, token_types, positions)
        hidden = self.parallel.scatter(embedded if self.projection is None else self.projection(embedded))
        if self.graphs:
            # Tensors of the last pass lie in the graphs' memory and may be overwritten from here on.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        for number, layer in enumerate(self.layers):
            rotary = rotaries[self.config.is_local(number)] if rotaries else None
            if self.recompute and self.training:
                hidden = self.parallel.checkpoint(layer, hidden, packing, rotary)
            else:
                hidden = layer(hidden, packing, rotary)
        if self.config.pre_norm:
            hidden = self.LayerNorm(hidden)
        hidden = self.parallel.gather(hidden)
        if extra:
            hidden = hidden[:count]
        if self.pooler is None:
            return hidden, None
        first = hidden.index_select(0, packing.starts[:samples])  # [T, H] -> [S, H]
        return hidden, torch.tanh(self.pooler(first))

    def compile_layers(self, *, fused: bool, graph_tokens: int | None = None) -> None:
        """Compiles each layer by torch.compile; parameters keep their names.

        Layers of one shape share a compiled graph, for any number of tokens. `fused`: attention is one
        variable-length kernel, unless it has dropout; elsewhere it stays eager, since its code loops over the
        runs of samples of equal length, which are others in each batch. `graph_tokens`, the most tokens of a
        pass: on CUDA the kernels of a layer are recorded and replayed as graphs, for at most `GRAPH_SIZES`
        numbers of tokens, to which each pass is padded.
        """
        how: dict[str, Any] = {"dynamic": True}
        if graph_tokens:
            self.graphs, self.token_multiple = True, -(-graph_tokens // GRAPH_SIZES)
            how["mode"] = "reduce-overhead"  # torch's name for it
        fused = fused and self.config.attention_probs_dropout_prob == 0
        for layer in self.layers:
            attention: nn.Module = layer.attention  # type: ignore[assignment]
            if not fused:
                attention.attend = torch.compiler.disable(attention.attend)  # type: ignore[no-untyped-call]
            layer.compile(**how)

    def rotations(self, positions: Tensor) -> tuple[Rotation, Rotation] | None:
        """Rotary angles of global and of local layers at `positions` [T]; None without rotary positions."""
        if not self.config.rotary:
            return None
        size = self.config.hidden_size // self.config.num_attention_heads
        longest = self.config.max_position_embeddings
        return (
            rotation(positions, longest, size, self.config.global_rope_theta),
            rotation(positions, longest, size, self.config.local_rope_theta),
        )


class Predictions(nn.Module):
    """Hidden states at P positions -> predictions over the vocabulary, by word embeddings of `width`."""

    def __init__(self, config: ModelConfig, vocab_size: int, layers: Layers, width: int) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, width, config.biases)
        self.LayerNorm = nn.LayerNorm(width, config.layer_norm_eps, bias=config.biases)
        self.decoder = TiedDecoder(layers, vocab_size, padded_vocab_size(vocab_size))

    def forward(
        self, hidden: Tensor, targets: Tensor, uniforms: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predicts the targets [P] from hidden states [P, H]; arguments and results are `TiedDecoder`'s."""
        predicted: tuple[Tensor, Tensor, Tensor] = self.decoder(self.transform(hidden), targets, uniforms)
        return predicted

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of all positions: [P, H] -> [P, V]."""
        return self.decoder.logits(self.transform(hidden))

    def transform(self, hidden: Tensor) -> Tensor:
        """The vectors that are multiplied with the word embeddings: [P, H] -> [P, width]."""
        transformed: Tensor = self.LayerNorm(F.gelu(self.dense(hidden)))
        return transformed


class Detector(nn.Module):
    """Hidden states [T, H] -> a logit for each token [T]: was it replaced? (Clark et al., 2020)"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, config.biases)
        self.output = Linear(config.hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.output(F.gelu(self.dense(hidden)))  # [T, H] -> [T, 1]
        return logits[:, 0].float()


def replace(
    tokens: Tensor, target_positions: Tensor, targets: Tensor, sampled: Tensor
) -> tuple[Tensor, Tensor]:
    """Puts ids `sampled` [P] at the masked positions of `tokens` [T].

    Returns the tokens [T] and which of them were replaced, bool [T]. A drawn id that equals the original,
    `targets` [P], replaces nothing; where that is -1, the token stays.
    """
    valid = targets >= 0
    sampled = torch.where(valid, sampled, tokens[target_positions])
    replaced = torch.zeros_like(tokens, dtype=torch.bool)
    replaced[target_positions] = valid & (sampled != targets)
    return tokens.index_copy(0, target_positions, sampled), replaced


class LossSums(NamedTuple):
    """Sums over samples: losses, and how many predictions were right; float32 scalars on the device.

    They are sums, not means, so that those of micro-batches and of ranks add up.
    """

    mlm: Tensor  # losses of the predicted positions: masked ones, or in causal batches all but the last
    pairs: Tensor  # losses of the sentence pairs
    rtd: Tensor  # losses of the tokens that may be replaced ones
    mlm_correct: Tensor
    pairs_correct: Tensor
    rtd_correct: Tensor
    replaced_found: Tensor  # replaced tokens that were found to be so
    replaced: Tensor  # replaced tokens


class PretrainingModel(nn.Module):
    """Encoder with the masked-language head and, where the config has it, that of sentence pairs.

    With a generator the masked-language head is the generator's, a smaller encoder on the same embeddings,
    and the encoder detects which of the tokens that it drew are not the original ones (Clark et al., 2020).
    `vocab_size` is the tokenizer's; the word embedding has `padded_vocab_size` rows.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, layers: Layers | None = None, recompute: str = "none"
    ) -> None:
        super().__init__()
        layers = layers or Layers()
        self.config, self.vocab_size, self.parallel = config, vocab_size, layers
        self.encoder = Encoder(config, vocab_size, layers, config.sentence_head, recompute)
        small, width = config.generator, config.hidden_size
        self.generator = Encoder(small, vocab_size, layers, False, recompute, width) if small else None
        self.predictions = Predictions(small or config, vocab_size, layers, width)
        self.predictions.decoder.weight = self.encoder.embeddings.word_embeddings.weight  # type: ignore[assignment]
        self.seq_relationship = Linear(config.hidden_size, 2) if config.sentence_head else None
        self.detector = Detector(config) if small else None

    def forward(self, batch: MicroBatch) -> LossSums:
        """Sums of the losses over the micro-batch, float32 scalars.

        Without labels, or without that head, a sample may hold several sequences, each with a length of
        its own; the pairs' sums are 0. So are those of replaced tokens without a generator, which draws an
        id for each masked position by `uniforms` [P].
        The projection to the vocabulary runs on the P predicted positions only.
        """
        tokens, target_positions, targets = batch.tokens, batch.target_positions, batch.targets
        sample = batch.token_types, batch.positions, batch.lengths
        if self.generator is None:
            hidden, pooled = self.encoder(tokens, *sample, causal=batch.causal)
            mlm, mlm_correct, _ = self.predictions(F.embedding(target_positions, hidden), targets, None)
            rtd = rtd_correct = replaced_found = replaced = torch.zeros_like(mlm_correct)
        else:
            assert self.detector is not None
            assert batch.uniforms is not None
            assert not batch.causal
            guessed, _ = self.generator(tokens, *sample, self.encoder.embeddings)
            mlm, mlm_correct, sampled = self.predictions(
                F.embedding(target_positions, guessed), targets, batch.uniforms
            )
            tokens, is_replaced = replace(tokens, target_positions, targets, sampled)
            hidden, pooled = self.encoder(tokens, *sample)
            verdict = self.detector(hidden)  # [T]
            rtd = F.binary_cross_entropy_with_logits(verdict, is_replaced.float(), reduction="sum")
            rtd_correct = ((verdict > 0) == is_replaced).sum().float()
            replaced_found, replaced = ((verdict > 0) & is_replaced).sum().float(), is_replaced.sum().float()
        pairs, pairs_correct = self.relate(pooled, batch.next_sentence_label, torch.zeros_like(mlm_correct))
        return LossSums(mlm, pairs, rtd, mlm_correct, pairs_correct, rtd_correct, replaced_found, replaced)

    def relate(
        self, pooled: Tensor | None, next_sentence_label: Tensor | None, nothing: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of the pairs' losses and right answers, from pooled first tokens [S, H]; `nothing` is a 0."""
        if self.seq_relationship is None:
            return nothing, nothing
        assert pooled is not None
        if next_sentence_label is None:
            # Zero, but with every weight in it: ZeRO waits for the gradients of all of them.
            return 0.0 * self.seq_relationship(pooled[:1]).float().sum(), nothing
        relation = self.seq_relationship(pooled).float()  # [S, 2]
        loss = F.cross_entropy(relation, next_sentence_label, reduction="sum")
        return loss, (relation.detach().argmax(dim=-1) == next_sentence_label).sum().float()


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, vocab_size: int, seed: int) -> Tensor:
    """The whole first value (float32, on the CPU) of the parameter `name` of global `shape`.

    With r = initializer_range, m = matrix_initializer_range or else r, l layers:

    | parameter                     | bert         | megatron-bert           | modern                  |
    | ----------------------------- | ------------ | ----------------------- | ----------------------- |
    | biases                        | 0            | 0                       | 0                       |
    | LayerNorm weights             | 1            | 1                       | 1                       |
    | embeddings                    | normal(0, r) | normal(0, r)            | cut normal(0, r)        |
    | attention.dense,              |              |                         |                         |
    | feed_forward.dense            | normal(0, m) | normal(0, m / sqrt(2 l)) | cut normal(0, m / sqrt(2 l)) |
    | predictions.dense,            |              |                         |                         |
    | detector.dense                | normal(0, m) | normal(0, m)            | cut normal(0, m / sqrt(2 l)) |
    | other matrices                | normal(0, m) | normal(0, m)            | cut normal(0, m)        |
    | padded rows of the vocabulary | 0, and they stay 0 (all presets)                                 |

    Those of a generator are drawn alike; its embeddings are the encoder's. Cut: at initializer_cutoff_factor
    deviations. Sources: Devlin et al., 2019, who drew matrices truncated at two deviations, where
    transformers' Bert draws them untruncated, as here; Shoeybi et al., 2019, and megatron-core, scaled by
    the 2 l residual branches; Warner et al., 2024, as in transformers' ModernBertPreTrainedModel. It depends
    on name, shape, config and seed alone, so that every topology starts from the same weights.
    """
    if name.endswith("bias"):
        return torch.zeros(*shape)
    if "LayerNorm" in name:
        return torch.ones(*shape)
    generator = torch.Generator().manual_seed(derive_seed(seed, name))
    deviation = config.initializer_range
    if "embeddings" not in name:
        deviation = config.matrix_initializer_range or deviation
    ends_branch = name.endswith(("attention.dense.weight", "feed_forward.dense.weight"))
    modern = config.preset == "modern"  # its own recipe, which follows from none of its properties
    if modern:
        ends_branch |= name in ("predictions.dense.weight", "detector.dense.weight")
    if ends_branch and config.pre_norm:
        deviation /= math.sqrt(2 * config.num_hidden_layers)
    value = torch.empty(*shape)
    if modern:
        limit = config.initializer_cutoff_factor * deviation
        nn.init.trunc_normal_(value, 0.0, deviation, -limit, limit, generator=generator)
    else:
        value.normal_(0.0, deviation, generator=generator)
    if name.endswith("word_embeddings.weight"):
        value[vocab_size:] = 0.0
    return value


def attended_pairs(length: int, half_window: int | None, causal: bool = False) -> int:
    """Number of (query, key) pairs of a sample of `length` tokens, in a window where attention is local."""
    if half_window is None or length <= half_window:
        pairs = length * length
    else:
        pairs = length * (2 * half_window + 1) - half_window * (half_window + 1)
    return (pairs + length) // 2 if causal else pairs  # half of them look ahead, but for each token itself


def model_flops_per_token(
    config: ModelConfig,
    vocab_size: int,
    attended: float,
    masked: float,
    attended_locally: float | None = None,
) -> float:
    """Model FLOPs of one training step for one real token (forward and backward, nothing recomputed), as of
    Chowdhery et al., 2022 ("PaLM"), appendix B, with this model's own products.

    `attended` is the mean number of tokens that a token attends to in a global layer, `attended_locally`
    in a local one (without it the window, or `attended` where that is less), `masked` the fraction of
    predicted tokens. With l layers, of which g are global, h wide, and the k matrices h x i of the
    feed-forward part (2, or 3 where it is gated):

        6 l (4 h^2 + k h i) + 12 h (g attended + (l - g) attended_locally) + 6 masked (h^2 + h V)

    A generator, h' and i' wide, adds the first two terms of its own and 6 h h' for the projection of the
    embeddings (none if h' = h); the head's h^2 is then h h'; the detector, on every token, is 6 (h^2 + h).
    """
    width, small = config.hidden_size, config.generator
    if attended_locally is None:
        attended_locally = min(attended, 2 * (config.half_window or 0) + 1)
    flops = layer_flops(config, attended, attended_locally)
    guesser = width
    if small is not None:
        guesser = small.hidden_size
        projection = width * guesser if guesser != width else 0
        flops += layer_flops(small, attended, attended_locally) + 6 * (projection + width**2 + width)
    return flops + 6 * masked * (guesser * width + width * vocab_size)


def layer_flops(config: ModelConfig, attended: float, attended_locally: float) -> float:
    """FLOPs of all layers for one token; see `model_flops_per_token`."""
    width, depth = config.hidden_size, config.num_hidden_layers
    local = sum(config.is_local(number) for number in range(depth))
    matrices = 3 if config.gated else 2
    layer = 4 * width**2 + matrices * width * config.intermediate_size
    pairs = (depth - local) * attended + local * attended_locally
    return 6 * depth * layer + 12 * width * pairs
