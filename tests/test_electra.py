"""Replaced-token detection: transformers' ELECTRA in outputs and gradients, draws and labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from dist import run_ranks
from torch import Tensor, nn

from bertscale.config import ModelConfig, padded_vocab_size
from bertscale.convert.electra import CLASSES, electra_config, to_electra
from bertscale.data.micro_batch import MicroBatch
from bertscale.model.layers import Layers
from bertscale.model.model import (
    PretrainingModel,
    initial_value,
    model_flops_per_token,
    replace,
)

VOCAB = 101  # 27 padded rows
MASK = 4
LENGTHS = (7, 7, 13, 2, 19, 13)  # odd, repeated, unsorted
SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 52,
    "max_position_embeddings": 23,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "sentence_head": False,
}


def with_generator(share: float, **values: Any) -> ModelConfig:
    return ModelConfig.model_validate({**SIZES, "generator_size": share, **values})


def random_model(sizes: ModelConfig, recompute: str = "none", seed: int = 0) -> PretrainingModel:
    model = PretrainingModel(sizes, VOCAB, recompute=recompute)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
        words: Any = model.encoder.embeddings.word_embeddings.weight
        words[VOCAB:] = 0.0
    return model


def masked_batch() -> dict[str, Any]:
    """The packed arguments of a forward pass, with about every third token masked."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (sum(LENGTHS),), generator=draw)
    places = (torch.rand(len(ids), generator=draw) < 0.3).nonzero().flatten()
    return {
        "tokens": ids.index_fill(0, places, MASK),
        "token_types": torch.cat([(torch.arange(length) > length // 2).long() for length in LENGTHS]),
        "positions": torch.cat([torch.arange(length) for length in LENGTHS]),
        "lengths": LENGTHS,
        "target_positions": places,
        "targets": ids[places],
        "num_targets": len(places),
        "next_sentence_label": torch.tensor([0, 1, 1, 0, 1, 0]),
        "uniforms": torch.rand(len(places), dtype=torch.float64, generator=draw),
    }


def theirs(ours: PretrainingModel, sizes: ModelConfig) -> dict[str, nn.Module]:
    """Both classes of transformers with the weights of ours."""
    found = {}
    for part, kind in CLASSES.items():
        values = electra_config(sizes, VOCAB, 0, part)
        model: nn.Module = getattr(transformers, kind)(transformers.AutoConfig.for_model(**values))
        weights: dict[str, Tensor] = {}
        for name, parameter in ours.named_parameters():
            weights |= to_electra(name, parameter.detach(), sizes, VOCAB, part)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert set(missing) <= {"generator_lm_head.weight", "electra.embeddings.position_ids"}
        assert not unexpected
        found[part] = model.train()
    return found


def rows(flat: Tensor, fill: int = 0) -> Tensor:
    """[T] -> [S, L], padded with `fill`."""
    parts = list(torch.split(flat, list(LENGTHS)))
    return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_losses_and_all_gradients_are_those_of_transformers(share: float, recompute: str) -> None:
    sizes = with_generator(share)
    ours = random_model(sizes, recompute)
    inputs = masked_batch()
    places, targets = inputs["target_positions"], inputs["targets"]
    masked, _, replaced, right, _, judged_right, found, number = ours(MicroBatch(**inputs))
    (masked / len(places) + 50 * replaced / sum(LENGTHS)).backward()

    models = theirs(ours, sizes)
    labels = torch.full_like(inputs["tokens"], -100).index_copy(0, places, targets)
    shared = {
        "attention_mask": rows(torch.ones_like(labels)),
        "token_type_ids": rows(inputs["token_types"]),
    }
    generated = models["generator"](input_ids=rows(inputs["tokens"]), labels=rows(labels, -100), **shared)
    logits = torch.cat([row[:length] for row, length in zip(generated.logits, LENGTHS, strict=True)])[places]
    cumulated = torch.softmax(logits.detach().double(), dim=-1).cumsum(dim=-1)
    drawn = (cumulated > inputs["uniforms"][:, None]).long().argmax(dim=-1)
    tokens = inputs["tokens"].index_copy(0, places, drawn)
    original = inputs["tokens"].index_copy(0, places, targets)
    judged = models["discriminator"](
        input_ids=rows(tokens), labels=rows((tokens != original).long()), **shared
    )
    torch.testing.assert_close(masked / len(places), generated.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(replaced / sum(LENGTHS), judged.loss, rtol=1e-5, atol=1e-6)
    assert int(right) == int((logits.argmax(dim=-1) == targets).sum())
    verdict = torch.cat([row[:length] for row, length in zip(judged.logits, LENGTHS, strict=True)])
    assert int(judged_right) == int(((verdict > 0) == (tokens != original)).sum())
    assert int(found) == int(((verdict > 0) & (tokens != original)).sum())
    assert 0 < int(number) == int((tokens != original).sum()) <= len(places)

    (generated.loss + 50 * judged.loss).backward()
    compared = set()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        wanted: dict[str, Tensor] = {}
        for part, model in models.items():
            gradients = {n: p.grad for n, p in model.named_parameters()}
            for each, value in to_electra(name, parameter.grad, sizes, VOCAB, part).items():
                compared.add((part, each))
                gradient = gradients[each]
                assert gradient is not None
                # The embeddings learn from both.
                wanted[each] = wanted.get(each, torch.zeros(())) + gradient
                if part == "discriminator" and name.startswith("encoder.embeddings."):
                    continue
                torch.testing.assert_close(value, wanted[each], rtol=1e-4, atol=2e-5, msg=name)
    assert compared == {(part, n) for part, model in models.items() for n, _ in model.named_parameters()}


@pytest.mark.parametrize("preset", ["bert", "megatron-bert", "modern"])
def test_every_preset_with_pairs_on_the_discriminator(preset: str) -> None:
    sizes = with_generator(0.5, preset=preset, sentence_head=True, intermediate_size=52)
    ours = random_model(sizes)
    sums = ours(MicroBatch(**masked_batch()))
    assert all(value.item() > 0 for value in sums[:3])
    sum(sums[:3]).backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    # What the discriminator says does not reach the generator, whose draws have no gradient.
    ours.zero_grad()
    ours(MicroBatch(**masked_batch()))[2].backward()
    assert ours.generator is not None
    layers = [*ours.generator.parameters(), *ours.predictions.dense.parameters()]
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in layers)


# ---------------------------------------------------------------------------------- labels and draws


def test_only_masked_positions_are_replaced_and_the_original_is_no_replacement() -> None:
    tokens = torch.tensor([2, 9, MASK, 8, MASK, 3, 7])
    places, targets = torch.tensor([2, 4, 6]), torch.tensor([5, 6, 7])  # the last one was left as it was
    filled, replaced = replace(tokens, places, targets, torch.tensor([5, 11, 7]))
    assert filled.tolist() == [2, 9, 5, 8, 11, 3, 7]
    assert replaced.tolist() == [False, False, False, False, True, False, False]
    assert tokens[2] == MASK  # the batch itself stays


def test_without_a_masked_position_all_is_original() -> None:
    sizes = with_generator(0.5)
    inputs = masked_batch()
    for key in ("target_positions", "targets", "uniforms"):
        inputs[key] = inputs[key][:0]
    masked, _, replaced, right, _, judged_right, found, number = random_model(sizes)(MicroBatch(**inputs))
    assert masked.item() == right.item() == found.item() == number.item() == 0
    assert replaced.item() > 0
    assert 0 <= int(judged_right) <= sum(LENGTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_follow_the_softmax(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    count, width, real = 60_000, 384, 330
    logits = (torch.randn(width, generator=draw) * 2).to(dtype)
    logits[real:] = torch.finfo(dtype).min  # padding
    uniforms = torch.rand(count, dtype=torch.float64, generator=draw)
    ids = Layers().sample(logits.expand(count, width).contiguous(), uniforms)
    share = torch.softmax(logits.double(), dim=0)
    drawn = torch.bincount(ids, minlength=width).double()
    assert int(ids.max()) < real
    deviation = (count * share * (1 - share)).sqrt()
    # Six deviations, and one and a half for the counts of rare ids, which are not normal.
    assert ((drawn - count * share).abs() <= 6 * deviation + 1.5).all()
    statistic = float(((drawn - count * share)[:real] ** 2 / (count * share)[:real]).sum())
    assert abs(statistic - (real - 1)) < 6 * (2 * (real - 1)) ** 0.5  # chi-squared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_at_the_edges(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    logits = torch.full((6, 256), lowest, dtype=dtype)
    for row, places in enumerate(([0], [255], [127], [128], [3, 250], [0, 100])):
        logits[row, places] = 80.0
    for chance in (0.0, 2.0**-33, 0.25):
        ids = Layers().sample(logits, torch.full((6,), chance, dtype=torch.float64))
        assert ids.tolist() == [0, 255, 127, 128, 3, 0]
    for chance in (0.75, 1 - 2.0**-33, 1 - 2.0**-53):
        ids = Layers().sample(logits, torch.full((6,), chance, dtype=torch.float64))
        assert ids.tolist() == [0, 255, 127, 128, 250, 100]
    before = logits.clone()
    Layers().sample(logits, torch.full((6,), 0.5, dtype=torch.float64))
    assert logits.equal(before)


def some_logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """[500, 384], of which 330 are pieces, and uniforms."""
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(500, 384, generator=draw) * 3
    logits[:, 330:] = torch.finfo(dtype).min
    logits[:50, :300] = torch.finfo(dtype).min  # some rows lie on one rank alone
    return logits.to(dtype), torch.rand(500, dtype=torch.float64, generator=draw)


def draws_of_a_rank(tensor: int) -> list[int]:
    """Runs on each rank: ids drawn from shares of the same logits."""
    from bertscale.train.device import local_device
    from bertscale.train.parallel import start_ranks

    ranks = start_ranks(tensor, local_device())
    logits, uniforms = some_logits()
    share = logits.chunk(tensor, dim=1)[ranks.tensor_rank].contiguous()
    ids = ranks.layers().sample(share, uniforms)
    assert ranks.layers().sample(share[:0], uniforms[:0]).tolist() == []
    return ids.tolist()


@pytest.mark.parametrize("tensor", [2, 4])
def test_ranks_that_share_the_vocabulary_draw_what_one_draws(tensor: int) -> None:
    logits, uniforms = some_logits()
    dense = Layers().sample(logits, uniforms).tolist()
    assert max(dense) < 330
    assert {min(3, place // 96) for place in dense} == {0, 1, 2, 3}  # some on each of four ranks
    for drawn in run_ranks(__file__, "draws_of_a_rank", world=tensor, tensor=tensor):
        assert drawn == dense


# ------------------------------------------------------------------------------------- first values, FLOPs


def test_first_values_of_the_generator() -> None:
    sizes = with_generator(0.5, initializer_range=0.02)
    shape = (24, 48)
    projection = initial_value("generator.projection.weight", shape, sizes, VOCAB, 3)
    assert abs(float(projection.std()) - 0.02) < 0.002
    one = initial_value("encoder.layers.0.attention.dense.weight", (24, 24), sizes, VOCAB, 3)
    other = initial_value("generator.layers.0.attention.dense.weight", (24, 24), sizes, VOCAB, 3)
    assert not one.equal(other)


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("preset", ["bert", "modern"])
def test_flops_are_six_for_each_weight_of_both(preset: str, share: float) -> None:
    sizes = with_generator(share, preset=preset)
    with torch.device("meta"):
        model = PretrainingModel(sizes, VOCAB)
    assert model.generator is not None
    assert model.detector is not None
    parts = [model.encoder.layers, model.generator.layers, model.detector]
    if model.generator.projection is not None:
        parts.append(model.generator.projection)
    weights = sum(p.numel() for part in parts for n, p in part.named_parameters() if p.dim() == 2)
    assert model_flops_per_token(sizes, VOCAB, 0, 0) == 6 * weights
    head = model.predictions.dense.weight.numel() + 48 * VOCAB
    assert model_flops_per_token(sizes, VOCAB, 0, 1) == 6 * (weights + head)
    assert padded_vocab_size(VOCAB) > VOCAB
    # Attended tokens count for the layers of both.
    both = model_flops_per_token(sizes, VOCAB, 5, 0) - 6 * weights
    assert both == 12 * sizes.num_hidden_layers * 5 * (48 + 48 * share)


def test_a_table_of_an_older_checkpoint_has_no_generator() -> None:
    older = ModelConfig.model_validate(SIZES).model_dump()
    del older["generator_size"]
    assert ModelConfig.model_validate(older).generator is None
