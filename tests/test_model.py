"""Each preset against its transformers class: loss, logits, every parameter's gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from bertscale.config import ModelConfig, padded_vocab_size
from bertscale.convert.hf_names import from_hugging_face, hugging_face_config, hugging_face_names, model_of
from bertscale.data.micro_batch import MicroBatch
from bertscale.model.kernels import (
    SHORT,
    Packing,
    _attend_padded,
    _attend_run_cuda,
    attend,
    rotate,
    rotation,
)
from bertscale.model.model import (
    PretrainingModel,
    attended_pairs,
    initial_value,
    join_fused,
    model_flops_per_token,
    split_fused,
)

VOCAB = 101  # 27 padded rows
LENGTHS = (7, 7, 13, 2, 19, 13)  # odd, repeated, unsorted
COMMON = {
    "num_hidden_layers": 3,
    "hidden_size": 36,
    "num_attention_heads": 3,
    "intermediate_size": 52,
    "max_position_embeddings": 23,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}
OF_PRESET: dict[str, dict[str, Any]] = {
    "bert": {},
    "bert without pairs": {"sentence_head": False},
    "megatron-bert": {},
    "megatron-bert without pairs": {"sentence_head": False},
    # A window of 2 tokens to each side is narrower than the samples: dense with a band, and in blocks.
    "modern": {"num_hidden_layers": 5, "local_attention": 4, "intermediate_size": 54},
    "modern with a window for some": {"num_hidden_layers": 3, "local_attention": 14},
    "modern, all layers global": {"global_attn_every_n_layers": 1},
}
SIZES = ModelConfig.model_validate(COMMON)


def sizes_of(case: str) -> ModelConfig:
    preset = case.split(" ")[0].rstrip(",")
    return ModelConfig.model_validate({**COMMON, "preset": preset, **OF_PRESET[case]})


@pytest.fixture(params=OF_PRESET)
def sizes(request: pytest.FixtureRequest) -> ModelConfig:
    return sizes_of(request.param)


@pytest.fixture
def theirs(sizes: ModelConfig) -> nn.Module:
    torch.manual_seed(0)
    values = hugging_face_config(sizes, VOCAB, 0)
    config = transformers.AutoConfig.for_model(**values)
    model: nn.Module = getattr(transformers, values["architectures"][0])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def ours(sizes: ModelConfig, theirs: nn.Module) -> PretrainingModel:
    model = PretrainingModel(sizes, VOCAB)
    values = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(native(name, values, sizes))
    return model


def native(name: str, values: Mapping[str, Tensor], sizes: ModelConfig) -> Tensor:
    return from_hugging_face(
        name, [values[each].detach() for each in hugging_face_names(name, sizes.preset)], sizes
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


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_loss_logits_and_all_gradients_are_those_of_transformers(
    sizes: ModelConfig, theirs: nn.Module, ours: PretrainingModel, recompute: str
) -> None:
    ids, types, labels, pairs = batch()
    inputs = {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([torch.ones_like(i) for i in ids], 0),
        "labels": padded(labels, -100),
    }
    if sizes.preset != "modern":
        inputs["token_type_ids"] = padded(types, 0)
    if sizes.sentence_head:
        inputs["next_sentence_label"] = pairs
    output = theirs(**inputs)
    output.loss.backward()

    flat_labels = torch.cat(labels)
    places = (flat_labels >= 0).nonzero().flatten()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    packed = (torch.cat(ids), torch.cat(types), positions, LENGTHS)
    again = PretrainingModel(sizes, VOCAB, recompute=recompute)
    again.load_state_dict(ours.state_dict())
    sums = again(MicroBatch(*packed, places, flat_labels[places], len(places), pairs))
    masked, relation, replaced, right, relation_right, *_ = sums
    assert float(replaced) == 0  # no generator
    loss = masked / len(places) + relation / len(LENGTHS)
    loss.backward()
    torch.testing.assert_close(loss, output.loss, rtol=1e-6, atol=1e-6)

    hidden, pooled = ours.encoder(*packed)
    logits = ours.predictions.logits(hidden)
    their_logits = output.prediction_logits if sizes.sentence_head else output.logits
    real = torch.cat([row[:length] for row, length in zip(their_logits, LENGTHS, strict=True)])
    torch.testing.assert_close(logits[:, :VOCAB], real, rtol=1e-5, atol=2e-5)
    assert int(right) == int((real[places].argmax(-1) == flat_labels[places]).sum())
    if ours.seq_relationship is not None:
        relation_logits = ours.seq_relationship(pooled)
        torch.testing.assert_close(relation_logits, output.seq_relationship_logits, rtol=1e-5, atol=1e-5)
        assert int(relation_right) == int((output.seq_relationship_logits.argmax(-1) == pairs).sum())
    else:
        assert pooled is None
        assert float(relation) == float(relation_right) == 0

    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    compared = set()
    for name, parameter in again.named_parameters():
        assert parameter.grad is not None, name
        wanted = native(name, gradients, sizes)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5, msg=name)
        compared |= set(hugging_face_names(name, sizes.preset))
    assert compared == set(gradients)  # nothing of theirs is left out


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_causal_loss_logits_and_all_gradients_are_those_of_transformers_with_dense_causal_masks(
    sizes: ModelConfig, theirs: nn.Module, ours: PretrainingModel, recompute: str
) -> None:
    ids, types, *_ = batch()
    longest = max(LENGTHS)
    whole, local = (
        torch.zeros(len(LENGTHS), 1, longest, longest).masked_fill_(far, torch.finfo(torch.float32).min)
        for far in (_far(longest, None, causal=True), _far(longest, sizes.half_window, causal=True))
    )
    inputs: dict[str, Any] = {"input_ids": padded(ids, 0), "attention_mask": whole}
    if sizes.preset == "modern":
        inputs["attention_mask"] = {"full_attention": whole, "sliding_attention": local}
    else:
        inputs["token_type_ids"] = padded(types, 0)
    output = theirs(**inputs)
    their_logits = output.prediction_logits if sizes.sentence_head else output.logits
    next_ids = padded([torch.cat([row[1:], torch.tensor([-100])]) for row in ids], -100)
    wanted: Any = F.cross_entropy(their_logits.flatten(0, 1), next_ids.flatten())
    wanted.backward()

    model = PretrainingModel(sizes, VOCAB, recompute=recompute)
    model.load_state_dict(ours.state_dict())
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    labels = torch.cat([row[: len(each)] for row, each in zip(next_ids, ids, strict=True)])
    places = (labels >= 0).nonzero().flatten()
    packed = (torch.cat(ids), torch.cat(types), positions, LENGTHS)
    sums = model(MicroBatch(*packed, places, labels[places], len(places), causal=True))
    (sums.mlm / len(places) + sums.pairs).backward()
    torch.testing.assert_close(sums.mlm / len(places), wanted, rtol=1e-6, atol=1e-6)
    real = torch.cat([row[:length] for row, length in zip(their_logits, LENGTHS, strict=True)])
    assert int(sums.mlm_correct) == int((real[places].argmax(-1) == labels[places]).sum())
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    squares, their_squares = torch.zeros(()), torch.zeros(())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith(("encoder.pooler", "seq_relationship")):
            assert not parameter.grad.any()
            continue
        gradient = native(name, gradients, sizes)
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5, msg=name)
        squares += parameter.grad.square().sum()
        their_squares += gradient.square().sum()
    torch.testing.assert_close(squares.sqrt(), their_squares.sqrt(), rtol=1e-5, atol=0)


def test_the_config_of_transformers_and_back(sizes: ModelConfig, theirs: nn.Module) -> None:
    config: Any = theirs.config
    assert model_of(hugging_face_config(sizes, VOCAB, 0), "ours") == sizes
    saved = {**config.to_dict(), "sentence_head": sizes.sentence_head}
    assert model_of(saved, "theirs") == sizes


def test_padded_rows_of_the_vocabulary_are_never_predicted(ours: PretrainingModel) -> None:
    bias: Any = ours.predictions.decoder.bias
    with torch.no_grad():
        bias[VOCAB:] = 100.0  # they would win if they took part
    logits = ours.predictions.logits(torch.randn(5, SIZES.hidden_size)).detach()
    assert logits.shape == (5, padded_vocab_size(VOCAB))
    assert int(logits.argmax(-1).max()) < VOCAB
    assert float(torch.softmax(logits, -1)[:, VOCAB:].sum()) == 0.0


@pytest.mark.parametrize("case", ["modern", "megatron-bert"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_dropout_is_the_same_when_it_is_recomputed(case: str, recompute: str) -> None:
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    sizes = sizes_of(case).model_copy(update=dropout)
    found = []
    for mode in ("none", recompute):
        model = PretrainingModel(sizes, VOCAB, recompute=mode)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(initial_value(name, parameter.shape, sizes, VOCAB, 5))
        ids, types, labels, pairs = (torch.cat(each) if isinstance(each, list) else each for each in batch())
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        places = (labels >= 0).nonzero().flatten()
        torch.manual_seed(4)
        micro_batch = MicroBatch(ids, types, positions, LENGTHS, places, labels[places], len(places), pairs)
        masked, relation, *_ = model(micro_batch)
        (masked + relation).backward()
        found.append([masked, *(parameter.grad for parameter in model.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_samples_of_a_packed_batch_do_not_see_each_other(causal: bool) -> None:
    torch.manual_seed(0)
    query_key_value = torch.randn(sum(LENGTHS), 2, 3, 4)
    packing = Packing.of(LENGTHS, query_key_value.device, causal=causal)
    together = attend(query_key_value, packing, 0.0)
    alone = [
        attend(part, Packing.of((len(part),), part.device, causal=causal), 0.0)
        for part in torch.split(query_key_value, list(LENGTHS))
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    query, key, value = query_key_value[:7].double().permute(2, 1, 0, 3)  # [7, A, 3, D] -> 3 x [A, 7, D]
    scores = (query @ key.transpose(1, 2) / 4**0.5).masked_fill(_far(7, None, causal=causal), -torch.inf)
    formula = F.softmax(scores, dim=-1) @ value
    torch.testing.assert_close(alone[0].double(), formula.transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("half_window", [None, SHORT])
def test_short_samples_are_padded_together_and_attend_as_alone(half_window: int | None, causal: bool) -> None:
    lengths = (3, 16, 9, 20, 20, 70, 33, 64, 1)
    device = torch.device("cpu")
    packing = Packing.of(lengths, device, causal=causal)
    assert [(group.samples, group.length) for group in packing.groups] == [
        *((3, 16), (2, 20), (1, 70), (1, 33), (1, 64), (1, 1))
    ]
    packed = torch.randn(sum(lengths), 2, 3, 8, requires_grad=True)
    weights = torch.randn(sum(lengths), 2, 8)
    together = attend(packed, packing, 0.0, half_window)
    alone = torch.cat(
        [
            attend(part, Packing.of((len(part),), device, causal=causal), 0.0, half_window)
            for part in torch.split(packed, list(lengths))
        ]
    )
    for one, other in (
        (together, alone),
        [torch.autograd.grad((output * weights).sum(), packed)[0] for output in (together, alone)],
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def _padded(packed: Tensor, packing: Packing, half_window: int | None) -> Tensor:
    return _attend_padded(packed, packing, 0.0, half_window)


def _runs(packed: Tensor, packing: Packing, half_window: int | None) -> Tensor:
    parts = torch.split(packed, [samples * length for samples, length in packing.runs])
    return torch.cat(
        [
            _attend_run_cuda(part, samples, 0.0, half_window, packing.causal)
            for part, (samples, _) in zip(parts, packing.runs, strict=True)
        ]
    )


@pytest.mark.parametrize("on_gpu", [_padded, _runs])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("half_window", [None, 3])
def test_attention_on_a_gpu_with_dropout_is_that_of_each_sample(
    half_window: int | None, causal: bool, on_gpu: Callable[[Tensor, Packing, int | None], Tensor]
) -> None:
    """With dropout, for which its variable-length kernel has no place."""
    lengths = (1, 5, 5, 13, 20)
    packing = Packing.of(lengths, torch.device("cpu"), causal=causal)
    packed = torch.randn(sum(lengths), 2, 3, 8, requires_grad=True)
    weights = torch.randn(sum(lengths), 2, 8)
    results = []
    for output in (attend(packed, packing, 0.0, half_window), on_gpu(packed, packing, half_window)):
        results.append((output, *torch.autograd.grad((output * weights).sum(), packed)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("half_window", [1, 2, 3, 5, 12, None])
def test_a_layer_sees_its_window_and_nothing_else(half_window: int | None, causal: bool) -> None:
    torch.manual_seed(0)
    lengths = (7, 7, 24, 2, 19, 1, 13, 25, 60)
    packed = torch.randn(sum(lengths), 2, 3, 4, requires_grad=True)
    weights = torch.randn(sum(lengths), 2, 4)
    local = attend(packed, Packing.of(lengths, packed.device, causal=causal), 0.0, half_window)
    (gradient,) = torch.autograd.grad((local * weights).sum(), packed)
    parts = []
    for sample in torch.split(packed, list(lengths)):
        query, key, value = sample.permute(2, 1, 0, 3)  # [L, A, 3, D] -> 3 x [A, L, D]
        far = _far(len(sample), half_window, causal=causal)
        scores = (query @ key.transpose(1, 2) / 2).masked_fill(far, -torch.inf)
        parts.append((F.softmax(scores, dim=-1) @ value).transpose(0, 1))
    formula = torch.cat(parts)
    torch.testing.assert_close(local, formula, rtol=1e-5, atol=1e-6)
    (wanted,) = torch.autograd.grad((formula * weights).sum(), packed)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)
    seen = [int((~_far(length, half_window, causal=causal)).sum()) for length in lengths]
    assert seen == [attended_pairs(length, half_window, causal) for length in lengths]


def _far(length: int, half_window: int | None, *, causal: bool) -> Tensor:
    """Which keys [L, L] a query of a sample does not see."""
    place = torch.arange(length)
    ahead = place - place[:, None]
    return (ahead.abs() > (length if half_window is None else half_window)) | (causal & (ahead > 0))


def test_rotary_positions_leave_products_to_the_distance_alone() -> None:
    torch.manual_seed(0)
    one = torch.randn(1, 2, 3, 8).expand(90, 2, 3, 8)
    turned = rotate(one, rotation(torch.arange(90), 100, 8, 50.0))
    query, key, value = turned.unbind(2)
    torch.testing.assert_close(value, one[:, :, 2])
    products = torch.einsum("iad,jad->aij", query, key)
    for distance in (0, 3, 17):
        diagonal = products.diagonal(distance, dim1=1, dim2=2)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert float((products[:, 0, 0] - products[:, 0, 1]).abs().min()) > 1e-3


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


@pytest.mark.parametrize("preset", ["bert", "megatron-bert", "modern"])
def test_first_values_of_each_preset_are_the_published_ones(preset: str) -> None:
    sizes = ModelConfig.model_validate({"preset": preset, "num_hidden_layers": 8, "hidden_size": 192})

    def deviation(name: str, *shape: int) -> tuple[float, float]:
        value = initial_value(name, shape, sizes, VOCAB, 3)[:VOCAB]
        return float(value.std()), float(value.abs().max())

    inner = {
        "encoder.layers.1.attention.query_key_value.weight",
        "encoder.layers.1.feed_forward.intermediate.weight",
        "encoder.pooler.weight",
        "encoder.embeddings.word_embeddings.weight",
    }
    ending = {"encoder.layers.1.attention.dense.weight", "encoder.layers.1.feed_forward.dense.weight"}
    (ending if preset == "modern" else inner).add("predictions.dense.weight")
    for names, scale in ((inner, 1.0), (ending, 1.0 if preset == "bert" else 16**-0.5)):
        for name in names:
            found, largest = deviation(name, 512, 192)
            if preset == "modern":  # cut at two deviations, a normal distribution has 0.88 of its own
                assert found == pytest.approx(0.02 * scale * 0.8796, rel=0.03), name
                assert largest <= 0.04 * scale
            else:
                assert found == pytest.approx(0.02 * scale, rel=0.03), name


@pytest.mark.parametrize(("attended", "expected"), [(128, 1.88e9), (512, 1.99e9)])
@pytest.mark.parametrize("preset", ["bert", "megatron-bert"])
def test_flops_of_bert_large_are_the_published_count(preset: str, attended: int, expected: float) -> None:
    large = ModelConfig.model_validate(
        {
            "preset": preset,
            "num_hidden_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        }
    )
    assert model_flops_per_token(large, 30522, attended, 0.15) == pytest.approx(expected, rel=0.01)


def test_flops_of_modern_are_six_for_each_weight_and_count_the_window() -> None:
    base = ModelConfig(preset="modern", num_hidden_layers=22, intermediate_size=1152)
    with torch.device("meta"):
        model = PretrainingModel(base, 50432)
    matrices = sum(p.numel() for name, p in model.encoder.layers.named_parameters() if p.dim() == 2)
    assert model_flops_per_token(base, 50432, 0, 0) == 6 * matrices
    decoder: Any = model.predictions.decoder
    head = model.predictions.dense.weight.numel() + decoder.weight.numel()
    assert model_flops_per_token(base, 50432, 0, 1) == 6 * (matrices + head)
    # 8 of 22 layers are global; a local one sees at most 64 tokens to each side and the token itself.
    pairs = (model_flops_per_token(base, 50432, 1024, 0) - 6 * matrices) / 12 / 768
    assert pairs == pytest.approx(8 * 1024 + 14 * 129)
    assert attended_pairs(1024, 64) / 1024 == pytest.approx(129 - 64 * 65 / 1024)


@pytest.mark.parametrize(
    ("name", "rows", "first"),
    [
        ("encoder.layers.0.attention.query_key_value.weight", 18, [0, 1, 6, 7, 12, 13]),  # queries of 3 heads
        (
            "encoder.layers.0.feed_forward.intermediate.weight",
            18,
            [0, 1, 2, 6, 7, 8, 12, 13, 14],
        ),  # inputs of 3 groups
        ("generator.layers.0.attention.query_key_value.weight", 6, [0, 1]),  # of its one head
        ("encoder.layers.0.attention.dense.weight", 6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_fused_matrices_are_split_and_joined(name: str, rows: int, first: list[int]) -> None:
    config = ModelConfig(
        preset="modern", hidden_size=6, num_attention_heads=3, intermediate_size=9, generator_size=1 / 3
    )
    value = torch.arange(rows)[:, None].expand(-1, 2)
    parts = split_fused(name, value, config)
    assert parts[0, :, 0].tolist() == first
    torch.testing.assert_close(join_fused(name, parts, config), value)
