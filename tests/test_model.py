"""The `bert` preset against transformers' BertForPreTraining: loss, logits, every parameter's gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForPreTraining

from bertscale.config import ModelConfig
from bertscale.convert import from_hugging_face, hugging_face_names
from bertscale.kernels import Packing, attend
from bertscale.model import (
    PretrainingModel,
    initial_value,
    model_flops_per_token,
    padded_vocab_size,
)

VOCAB = 101  # 27 padded rows
LENGTHS = (7, 7, 13, 2, 19, 13)  # odd, repeated, unsorted
SIZES = ModelConfig(
    num_hidden_layers=3,
    hidden_size=36,
    num_attention_heads=3,
    intermediate_size=52,
    max_position_embeddings=23,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.3,
)


@pytest.fixture
def theirs() -> nn.Module:
    torch.manual_seed(0)
    sizes = SIZES.model_dump(exclude={"preset"})
    model: nn.Module = BertForPreTraining(BertConfig(vocab_size=VOCAB, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def ours(theirs: nn.Module) -> PretrainingModel:
    model = PretrainingModel(SIZES, VOCAB)
    values = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(native(name, values))
    return model


def native(name: str, values: Mapping[str, Tensor]) -> Tensor:
    return from_hugging_face(
        name, [values[each].detach() for each in hugging_face_names(name)], SIZES.num_attention_heads
    )


def batch() -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Ids, token types and labels (-100: not predicted) of each sample, and the pairs' labels."""
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(VOCAB, (length,), generator=draw) for length in LENGTHS]
    types = [(torch.arange(length) > length // 2).long() for length in LENGTHS]
    labels = [torch.where(torch.rand(len(i), generator=draw) < 0.3, i, -100) for i in ids]
    labels[0][0] = 5
    return ids, types, labels, torch.tensor([0, 1, 1, 0, 1, 0])


def padded(rows: list[Tensor], fill: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def test_loss_logits_and_all_gradients_are_those_of_transformers(
    theirs: nn.Module, ours: PretrainingModel
) -> None:
    ids, types, labels, pairs = batch()
    output = theirs(
        input_ids=padded(ids, 0),
        token_type_ids=padded(types, 0),
        attention_mask=padded([torch.ones_like(i) for i in ids], 0),
        labels=padded(labels, -100),
        next_sentence_label=pairs,
    )
    output.loss.backward()

    flat_labels = torch.cat(labels)
    places = (flat_labels >= 0).nonzero().flatten()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    packed = (torch.cat(ids), torch.cat(types), positions, LENGTHS)
    masked, relation, right, relation_right = ours(*packed, places, flat_labels[places], pairs)
    loss = masked / len(places) + relation / len(LENGTHS)
    loss.backward()
    torch.testing.assert_close(loss, output.loss, rtol=1e-6, atol=1e-6)

    hidden, pooled = ours.encoder(*packed)
    logits = ours.predictions(hidden)
    real = torch.cat([row[:length] for row, length in zip(output.prediction_logits, LENGTHS, strict=True)])
    torch.testing.assert_close(logits[:, :VOCAB], real, rtol=1e-5, atol=2e-5)
    relation_logits = ours.seq_relationship(pooled)
    torch.testing.assert_close(relation_logits, output.seq_relationship_logits, rtol=1e-5, atol=1e-5)
    assert int(right) == int((real[places].argmax(-1) == flat_labels[places]).sum())
    assert int(relation_right) == int((output.seq_relationship_logits.argmax(-1) == pairs).sum())

    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    compared = set()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        wanted = native(name, gradients)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5, msg=name)
        compared |= set(hugging_face_names(name))
    assert compared == set(gradients)  # nothing of theirs is left out


def test_padded_rows_of_the_vocabulary_are_never_predicted(ours: PretrainingModel) -> None:
    bias: Any = ours.predictions.decoder.bias
    with torch.no_grad():
        bias[VOCAB:] = 100.0  # they would win if they took part
    logits = ours.predictions(torch.randn(5, SIZES.hidden_size)).detach()
    assert logits.shape == (5, padded_vocab_size(VOCAB))
    assert int(logits.argmax(-1).max()) < VOCAB
    assert float(torch.softmax(logits, -1)[:, VOCAB:].sum()) == 0.0


def test_samples_of_a_packed_batch_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    query_key_value = torch.randn(sum(LENGTHS), 2, 3, 4)
    packing = Packing.of(LENGTHS, query_key_value.device)
    together = attend(query_key_value, packing, 0.0)
    alone = [
        attend(part, Packing.of((len(part),), part.device), 0.0)
        for part in torch.split(query_key_value, list(LENGTHS))
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    query, key, value = query_key_value[:7].double().permute(2, 1, 0, 3)  # [7, A, 3, D] -> 3 x [A, 7, D]
    formula = F.softmax(query @ key.transpose(1, 2) / 4**0.5, dim=-1) @ value
    torch.testing.assert_close(alone[0].double(), formula.transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_first_values_follow_the_table_and_the_name_alone() -> None:
    shape = (padded_vocab_size(VOCAB), 36)
    name = "encoder.embeddings.word_embeddings.weight"
    word = initial_value(name, shape, SIZES, VOCAB, 3)
    assert torch.equal(word, initial_value(name, shape, SIZES, VOCAB, 3))
    assert not torch.equal(word, initial_value(name, shape, SIZES, VOCAB, 4))
    assert abs(float(word[:VOCAB].std()) - 0.3) < 0.02
    assert float(word[VOCAB:].abs().max()) == 0.0
    assert float(initial_value("encoder.pooler.bias", (36,), SIZES, VOCAB, 3).abs().max()) == 0.0
    norm = initial_value("encoder.layers.0.attention.LayerNorm.weight", (36,), SIZES, VOCAB, 3)
    assert torch.equal(norm, torch.ones(36))


@pytest.mark.parametrize(("attended", "expected"), [(128, 1.88e9), (512, 1.99e9)])
def test_flops_of_bert_large_are_the_published_count(attended: int, expected: float) -> None:
    large = ModelConfig(
        num_hidden_layers=24, hidden_size=1024, num_attention_heads=16, intermediate_size=4096
    )
    assert model_flops_per_token(large, 30522, attended, 0.15) == pytest.approx(expected, rel=0.01)
