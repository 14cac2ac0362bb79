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
    loss_count,
    task_loss,
)

VOCAB = 101  # 27 padded rows
LENGTHS = (7, 7, 13, 2, 19, 12)  # repeated, unsorted; as multiple choice of 3, two examples
CHOICES = 3
KINDS = get_args(TaskKind)
OUTPUTS = {"regression": 1, "multiple_choice": 1, "question_answering": 2}  # others: 5
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"preset": "bert"},
    "megatron-bert": {"preset": "megatron-bert"},
    "modern cls": {"preset": "modern", "local_attention": 8},
    "modern mean": {"preset": "modern", "local_attention": 8},
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


def random_model(sizes: ModelConfig, head: HeadConfig) -> TaskModel:
    model = TaskModel(sizes, VOCAB, head)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
        words: Any = model.encoder.embeddings.word_embeddings.weight
        words[VOCAB:] = 0.0
    return model


def theirs_of(ours: TaskModel) -> nn.Module:
    """Transformers' class with the weights of ours."""
    sizes, head = ours.config, ours.head_config
    values = hugging_face_config(sizes, VOCAB, 0)
    if task_class(sizes, head.kind).startswith("Electra"):
        values |= {"model_type": "electra", "embedding_size": sizes.hidden_size, "summary_last_dropout": 0.0}
    values |= {"num_labels": head.outputs, "classifier_pooling": head.pooling}
    config = transformers.AutoConfig.for_model(**values)
    model: nn.Module = getattr(transformers, task_class(sizes, head.kind))(config)
    weights: dict[str, Tensor] = {}
    for name, parameter in ours.named_parameters():
        weights |= to_task(name, parameter.detach(), sizes, VOCAB, head.kind)
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
        inputs = {name: value.unflatten(0, (-1, CHOICES)) for name, value in inputs.items()}
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
    theirs = theirs_of(ours)
    their_loss, their_logits = loss_and_logits(theirs, sizes, kind, batch)
    their_loss.backward()

    logits = ours(batch)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=2e-5)
    assert batch.targets is not None
    loss = task_loss(kind, logits, batch) / loss_count(kind, batch.targets)
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=1e-6)
    loss.backward()
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
