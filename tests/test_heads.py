"""Task models against transformers' classes: logits, loss and every gradient, first values, losses alone."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import transformers
from torch import Tensor, nn

from bertscale.config import ModelConfig
from bertscale.config.examples import TaskKind
from bertscale.convert.hf_names import from_hugging_face, hugging_face_config
from bertscale.convert.task_names import task_class, task_names, to_task
from bertscale.model.heads import (
    HeadConfig,
    TaskBatch,
    TaskModel,
    head_initial_value,
    loss_count,
    task_loss,
)

VOCAB = 101  # 27 padded rows
LENGTHS = (7, 7, 13, 2, 19, 12)  # of the samples: repeated, unsorted; as multiple choice of 3, two examples
CHOICES = 3
KINDS = get_args(TaskKind)
OUTPUTS = {"regression": 1, "multiple_choice": 1, "question_answering": 2}  # others: 5
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"preset": "bert"},
    "megatron-bert": {"preset": "megatron-bert"},
    "modern cls": {"preset": "modern", "local_attention": 8, "num_hidden_layers": 3},
    "modern mean": {"preset": "modern", "local_attention": 8, "num_hidden_layers": 3},
    "electra": {"preset": "bert", "generator_size": 0.5, "sentence_head": False},
}
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 36,
    "num_attention_heads": 2,
    "intermediate_size": 52,
    "max_position_embeddings": 23,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def sizes_of(family: str, **values: Any) -> ModelConfig:
    return ModelConfig.model_validate({**SIZES, **FAMILIES[family], **values})


def head_of(family: str, kind: TaskKind, dropout: float | None = 0.0) -> HeadConfig:
    pooling = "mean" if family == "modern mean" else "cls"
    return HeadConfig(kind, OUTPUTS.get(kind, 5), pooling, dropout)  # type: ignore[arg-type]


def random_model(sizes: ModelConfig, head: HeadConfig, vocab: int = VOCAB) -> TaskModel:
    model = TaskModel(sizes, vocab, head)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
        words: Any = model.encoder.embeddings.word_embeddings.weight
        words[vocab:] = 0.0
    return model


def fresh_theirs(sizes: ModelConfig, head: HeadConfig, **values: Any) -> Any:
    """Transformers' class with first weights of its own."""
    kind = task_class(sizes, head.kind)
    values = {**hugging_face_config(sizes, VOCAB, 0), "num_labels": head.outputs, **values}
    if kind.startswith("ModernBert"):
        values["classifier_pooling"] = head.pooling
    if kind.startswith("Electra"):
        values |= {"model_type": "electra", "embedding_size": sizes.hidden_size}
    return getattr(transformers, kind)(transformers.AutoConfig.for_model(**values))


def theirs_of(ours: TaskModel, **values: Any) -> Any:
    """Transformers' class with the weights of ours."""
    model = fresh_theirs(ours.config, ours.head_config, **values)
    weights: dict[str, Tensor] = {}
    for name, parameter in ours.named_parameters():
        weights |= to_task(name, parameter.detach(), ours.config, VOCAB, ours.head_config.kind)
    model.load_state_dict(weights)
    return model.train()


def batch_of(kind: TaskKind) -> TaskBatch:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (sum(LENGTHS),), generator=draw)
    samples = len(LENGTHS)
    targets = {
        "classification": torch.randint(5, (samples,), generator=draw),
        "multi_label": torch.randint(2, (samples, 5), generator=draw).float(),
        "regression": torch.randn(samples, generator=draw),
        "tokens": torch.randint(5, (len(tokens),), generator=draw).index_fill(
            0, torch.arange(0, len(tokens), 3), -100
        ),
        "question_answering": torch.tensor([[0, 0], [2, 6], [11, 12], [1, 1], [0, 18], [5, 7]]),
        "multiple_choice": torch.tensor([2, 0]),
    }[kind]
    return TaskBatch(
        tokens,
        torch.cat([(torch.arange(length) > length // 2).long() for length in LENGTHS]),
        torch.cat([torch.arange(length) for length in LENGTHS]),
        LENGTHS,
        targets,
        (CHOICES,) * (samples // CHOICES) if kind == "multiple_choice" else None,
    )


def rows(flat: Tensor, fill: int = 0) -> Tensor:
    """[T] -> [S, L], padded with `fill`."""
    parts = list(torch.split(flat, list(LENGTHS)))
    return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)


def flat(padded: Tensor) -> Tensor:
    """[S, L, ...] -> [T, ...], without the padding."""
    return torch.cat([row[:length] for row, length in zip(padded, LENGTHS, strict=True)])


def inputs_of(sizes: ModelConfig, kind: TaskKind, batch: TaskBatch) -> dict[str, Tensor]:
    """The batch as transformers' classes take it, padded and without targets."""
    inputs = {"input_ids": rows(batch.tokens), "attention_mask": rows(torch.ones_like(batch.tokens))}
    if not sizes.rotary:
        inputs["token_type_ids"] = rows(batch.token_types)
    if kind == "multiple_choice":
        inputs = {name: value.view(-1, CHOICES, value.shape[1]) for name, value in inputs.items()}
    return inputs


def loss_and_logits(model: nn.Module, sizes: ModelConfig, kind: TaskKind, batch: TaskBatch) -> Any:
    """Transformers' mean loss, and its logits as ours are laid out."""
    inputs, targets = inputs_of(sizes, kind, batch), batch.targets
    assert targets is not None
    if kind == "question_answering":
        # Its softmax takes in the padding, so each sample is asked alone; all weigh the same.
        losses, logits = [], []
        for number, length in enumerate(LENGTHS):
            row = {name: value[number : number + 1, :length] for name, value in inputs.items()}
            begin, end = targets[number : number + 1].unbind(1)
            output = model(**row, start_positions=begin, end_positions=end)
            losses.append(output.loss)
            logits.append(torch.stack([output.start_logits[0], output.end_logits[0]], dim=1))
        return torch.stack(losses).mean(), torch.cat(logits)
    output = model(**inputs, labels=rows(targets, -100) if kind == "tokens" else targets)
    logits = output.logits.reshape(-1, 1) if kind == "multiple_choice" else output.logits
    return output.loss, flat(logits) if kind == "tokens" else logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_all_gradients_are_those_of_transformers(family: str, kind: TaskKind) -> None:
    sizes, batch = sizes_of(family), batch_of(kind)
    ours = random_model(sizes, head_of(family, kind))
    theirs = theirs_of(ours, summary_last_dropout=0.0)
    their_loss, their_logits = loss_and_logits(theirs, sizes, kind, batch)
    their_loss.backward()

    logits = ours(batch)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=2e-5)
    assert batch.targets is not None
    loss = task_loss(kind, logits, batch) / loss_count(kind, batch.targets)
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    compared = set()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        names = task_names(name, sizes, kind)
        values = [gradients[each] for each in names]
        wanted = values[0] if name.startswith("head.") else from_hugging_face(name, values, sizes)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5, msg=name)
        compared |= set(names)
    assert compared == set(gradients)  # nothing of theirs is left out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_has_the_place_and_the_probability_of_transformers(family: str, kind: TaskKind) -> None:
    sizes = sizes_of(family, hidden_dropout_prob=0.4)
    ours = random_model(sizes, head_of(family, kind, dropout=None))
    theirs = theirs_of(ours)
    for encoder in (ours.encoder, theirs.base_model):
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    # Samples of one length: then both draw equally many numbers in the same order.
    count, length = 6, 9
    tokens = torch.randint(VOCAB, (count * length,), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(length).repeat(count)
    batch = TaskBatch(tokens, torch.zeros_like(tokens), positions, (length,) * count)
    inputs = {"input_ids": tokens.view(count, length)}
    if kind == "multiple_choice":
        inputs["input_ids"] = tokens.view(-1, CHOICES, length)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    torch.manual_seed(3)
    logits = ours.train()(batch)
    torch.manual_seed(3)
    output = theirs(**inputs)
    if kind == "question_answering":
        wanted = torch.stack([output.start_logits, output.end_logits], dim=-1)
    else:
        wanted = output.logits
    torch.testing.assert_close(logits, wanted.reshape(logits.shape), rtol=1e-5, atol=2e-5)
    drops = sizes.preset != "modern" and kind != "question_answering"
    assert drops != torch.equal(logits, ours.eval()(batch))


def test_a_dropout_that_is_given_is_taken() -> None:
    for family in FAMILIES:
        for kind in KINDS:
            model = TaskModel(sizes_of(family), VOCAB, head_of(family, kind, dropout=0.25))
            assert model.head.dropout.p == 0.25


@pytest.mark.parametrize("family", FAMILIES)
def test_first_values_of_a_head_are_spread_as_those_of_transformers(family: str) -> None:
    # What the encoder began with plays no part.
    sizes = sizes_of(family, hidden_size=200, initializer_range=0.2, matrix_initializer_range=0.003)
    untouched = sizes.model_copy(update={"initializer_range": 0.02, "matrix_initializer_range": None})
    for kind in ("classification", "tokens", "multiple_choice", "question_answering"):
        head = HeadConfig(kind, 40 if kind in ("classification", "tokens") else 1, dropout=0.0)
        torch.manual_seed(0)
        theirs = dict(fresh_theirs(untouched, head).named_parameters())
        for name, parameter in TaskModel(sizes, VOCAB, head).named_parameters():
            if name.startswith("head.") or "pooler" in name:
                (wanted,) = (theirs[each].detach() for each in task_names(name, sizes, kind))
                value = head_initial_value(name, parameter.shape, sizes, seed=1)
                assert value.shape == wanted.shape
                assert value.equal(head_initial_value(name, parameter.shape, sizes, seed=1))
                if parameter.dim() < 2:
                    assert value.equal(wanted), name
                    continue
                assert not value.equal(head_initial_value(name, parameter.shape, sizes, seed=2))
                spread, error = float(wanted.std()), 5 / wanted.numel() ** 0.5
                assert float(value.std()) == pytest.approx(spread, rel=error), name
                if sizes.preset == "modern":
                    assert float(value.abs().max()) == pytest.approx(float(wanted.abs().max()), rel=error)


# ------------------------------------------------------------------------------------------------ losses


def batch_with(targets: Tensor, lengths: tuple[int, ...], groups: tuple[int, ...] | None) -> TaskBatch:
    nothing = torch.zeros(sum(lengths), dtype=torch.int64)
    return TaskBatch(nothing, nothing, nothing, lengths, targets, groups)


def test_weights_of_classes_and_smoothing_are_those_of_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(9, 4, generator=draw), torch.tensor([0.5, 2.0, 1.0, 3.0])
    labels = torch.randint(4, (9,), generator=draw)
    tags = labels.index_fill(0, torch.tensor([0, 5]), -100)
    kinds: list[tuple[TaskKind, Tensor]] = [("classification", labels), ("tokens", tags)]
    for kind, targets in kinds:
        for chosen in (None, weights):
            for smoothing in (0.0, 0.3):
                loss = task_loss(
                    kind,
                    logits,
                    batch_with(targets, (9,), None),
                    class_weights=chosen,
                    label_smoothing=smoothing,
                )
                wanted = nn.functional.cross_entropy(logits, targets, chosen, label_smoothing=smoothing)
                torch.testing.assert_close(loss / loss_count(kind, targets, chosen), wanted)
    several = torch.randint(2, (9, 4), generator=draw).float()
    batch = batch_with(several, (9,), None)
    loss = task_loss("multi_label", logits, batch, class_weights=weights) / loss_count(
        "multi_label", several, weights
    )
    of_each = nn.functional.binary_cross_entropy_with_logits(logits, several, reduction="none").mean(0)
    torch.testing.assert_close(loss, (of_each * weights).sum() / weights.sum())
    smooth = task_loss("multi_label", logits, batch, label_smoothing=0.2) / loss_count("multi_label", several)
    wanted = nn.functional.binary_cross_entropy_with_logits(logits, several * 0.8 + 0.1)
    torch.testing.assert_close(smooth, wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_choices_among_segments_are_cross_entropies_of_each(smoothing: float) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths, answers = (3, 1, 6, 2), torch.tensor([[0, 2], [0, 0], [5, 5], [1, 0]])
    # Large logits, which would overflow unless each segment's highest is taken off.
    logits = (torch.randn(12, 2, generator=draw) * 60 + 200).requires_grad_()
    loss = task_loss(
        "question_answering", logits, batch_with(answers, lengths, None), label_smoothing=smoothing
    )
    assert loss_count("question_answering", answers) == 4

    def one(part: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(part[None], target[None], label_smoothing=smoothing)

    parts = list(zip(torch.split(logits, list(lengths)), answers, strict=True))
    wanted = sum(
        (one(part[:, side], answer[side]) for part, answer in parts for side in (0, 1)), torch.tensor(0.0)
    )
    torch.testing.assert_close(loss, wanted / 2)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted / 2, logits)[0], rtol=1e-5, atol=1e-6)

    batch = batch_with(answers[:, 0], (5,) * 12, lengths)  # examples of 3, 1, 6 and 2 options
    loss = task_loss("multiple_choice", logits[:, :1], batch, label_smoothing=smoothing)
    torch.testing.assert_close(loss, sum((one(part[:, 0], answer[0]) for part, answer in parts), loss * 0))
    assert loss_count("multiple_choice", answers[:, 0]) == 4


def test_a_micro_batch_without_a_label_has_a_loss_of_zero() -> None:
    logits = torch.randn(5, 3, requires_grad=True)
    targets = torch.full((5,), -100)
    loss = task_loss("tokens", logits, batch_with(targets, (5,), None))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == loss_count("tokens", targets) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_moving_a_batch_moves_its_tensors() -> None:
    batch = batch_of("multiple_choice").to("meta")
    assert batch.tokens.is_meta
    assert batch.targets is not None
    assert batch.targets.is_meta
    assert (batch.lengths, batch.groups) == (LENGTHS, (CHOICES, CHOICES))
