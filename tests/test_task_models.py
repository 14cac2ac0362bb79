"""Folders of task models: ours in transformers, transformers' in ours, and the encoders that both give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_convert import write_checkpoint
from test_damaged_files import damage, header_edit, json_edit
from test_heads import FAMILIES, KINDS, OUTPUTS, SIZES, head_of, random_model, sizes_of
from torch import Tensor

from bertscale.config import UserError
from bertscale.config.examples import TaskKind
from bertscale.convert.encoders import open_encoder
from bertscale.convert.task_models import (
    LABELLED,
    PROBLEMS,
    is_task_model,
    open_task_model,
    write_task_model,
)
from bertscale.convert.task_names import SUFFIXES, task_class
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions
from bertscale.model.heads import HeadConfig, TaskBatch, TaskModel
from bertscale.tokenizer import Tokenizer, load_tokenizer
from bertscale.train.checkpoint import open_checkpoint

VOCAB = 330  # of the tiny data's tokenizer
LABELS = ["0", "no label", "être", "B-LOC", "x"]
FACTS = {"scheme": "bio", "threshold": 0.5}


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Tokenizer:
    return load_tokenizer(tiny_data)


def written(folder: Path, family: str, kind: TaskKind, tokenizer: Tokenizer) -> TaskModel:
    """A model with random weights, which is in `folder` too."""
    model = random_model(sizes_of(family), head_of(family, kind, dropout=0.125), VOCAB).eval()
    write(folder, model, tokenizer)
    return model


def write(folder: Path, model: TaskModel, tokenizer: Tokenizer) -> None:
    folder.mkdir()
    head = model.head_config
    labels = LABELS[: head.outputs] if head.kind in LABELLED else []
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    write_task_model(folder, model.config, VOCAB, head, labels, tensors, tokenizer, 17, FACTS)


def answers(model: Any, kind: TaskKind, ids: Tensor) -> Tensor:
    """Logits of transformers' class for two samples of one length, as ours are laid out."""
    ids = ids[None] if kind == "multiple_choice" else ids
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    if kind == "question_answering":
        return torch.stack([output.start_logits, output.end_logits], dim=-1).flatten(0, 1)
    logits: Tensor = output.logits.view(-1, 1) if kind == "multiple_choice" else output.logits
    return logits.flatten(0, 1) if kind == "tokens" else logits


def our_answers(model: TaskModel, ids: Tensor) -> Tensor:
    samples, length = ids.shape
    batch = TaskBatch(
        ids.flatten(),
        torch.zeros(ids.numel(), dtype=torch.int64),
        torch.arange(length).repeat(samples),
        (length,) * samples,
    )
    logits: Tensor = model(batch)
    return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_transformers_loads_our_folder_and_we_load_both(
    family: str, kind: TaskKind, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ours = written(tmp_path / "ours", family, kind, tokenizer)
    auto = getattr(transformers, f"AutoModel{SUFFIXES[kind]}")
    theirs, loading = auto.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading.values()), loading
    assert type(theirs).__name__ == task_class(ours.config, kind)
    ids = torch.randint(VOCAB, (2, 19), generator=torch.Generator().manual_seed(3))
    logits = our_answers(ours, ids)
    torch.testing.assert_close(answers(theirs.eval(), kind, ids), logits, rtol=1e-5, atol=2e-5)

    config = theirs.config
    if kind in LABELLED:
        assert config.id2label == dict(enumerate(LABELS))
        assert config.label2id == {label: number for number, label in enumerate(LABELS)}
    assert config.problem_type == PROBLEMS.get(kind)
    special = [getattr(config, key) for key in config.to_dict() if key.endswith("_token_id")]
    assert all(each is None or 0 <= each < VOCAB for each in special)
    assert (config.pad_token_id, config.cls_token_id) == (tokenizer.pad_id, tokenizer.cls_id)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert fast.model_max_length == 17
    assert ("token_type_ids" in fast("A cat.")) == (ours.config.preset != "modern")

    theirs.save_pretrained(tmp_path / "theirs")
    shutil.copyfile(tmp_path / "ours" / "tokenizer.model", tmp_path / "theirs" / "tokenizer.model")
    for name in ("ours", "theirs"):
        weights = open_task_model(tmp_path / name)
        assert is_task_model(tmp_path / name)
        assert weights.head == ours.head_config
        assert weights.labels == (LABELS if kind in LABELLED else [])
        assert weights.facts == {"max_length": 17, **FACTS}
        assert weights.max_length == 17
        assert weights.vocab_size == VOCAB
        known = {"generator_size", "sentence_head"}  # what a task model does not tell, and does not need
        assert weights.model.model_dump(exclude=known) == ours.config.model_dump(exclude=known)
        parameters = dict(ours.named_parameters())
        assert weights.names == list(parameters)
        for each, parameter in parameters.items():
            assert weights.tensor(each).equal(parameter), each
    assert open_task_model(tmp_path / "ours").digest() != open_task_model(tmp_path / "theirs").digest()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "megatron-bert", "modern cls", "electra"])
@torch.no_grad()
def test_a_model_that_transformers_made_is_read(family: str, kind: TaskKind, tmp_path: Path) -> None:
    name = task_class(sizes_of(family), kind)
    outputs = OUTPUTS.get(kind, 5)
    values: dict[str, Any] = {key: SIZES[key] for key in SIZES if not key.endswith("dropout_prob")}
    if family == "electra":
        values["embedding_size"] = values["hidden_size"]
    if family.startswith("modern"):
        values |= dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id"), 0)
    config = getattr(transformers, f"{name.partition('For')[0]}Config")(
        vocab_size=VOCAB, num_labels=outputs, **values
    )
    if kind == "multi_label":
        config.problem_type = PROBLEMS[kind]
    theirs = getattr(transformers, name)(config).eval()
    theirs.save_pretrained(tmp_path)
    weights = open_task_model(tmp_path)
    given = {"modern cls": 0.0, "electra": 0.1 if kind == "multiple_choice" else None}
    assert weights.head == HeadConfig(kind, outputs, "cls", given.get(family))
    assert weights.labels == ([f"LABEL_{number}" for number in range(outputs)] if kind in LABELLED else [])
    assert weights.facts == {}
    assert weights.max_length == 23
    ours = TaskModel(weights.model, weights.vocab_size, weights.head)
    for each, parameter in ours.named_parameters():
        parameter.copy_(weights.tensor(each))
    ids = torch.randint(VOCAB, (2, 19), generator=torch.Generator().manual_seed(3))
    wanted = answers(theirs, kind, ids)
    torch.testing.assert_close(our_answers(ours.eval(), ids), wanted, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ what is refused


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in values.items():
        if value is None:
            config.pop(key)
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def read_all(folder: Path) -> dict[str, Tensor]:
    weights = open_task_model(folder)
    return {name: weights.tensor(name) for name in weights.names}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "describes a BertForMaskedLM, which is no task model; give"),
        ({"architectures": None}, "architectures is missing"),
        ({"architectures": []}, "architectures: list should have at least 1 item"),
        ({"architectures": ["RobertaForTokenClassification"]}, "whose class is BertForTokenClassification"),
        ({"model_type": "funnel"}, "describes a model of type 'funnel'; this version converts bert"),
        ({"model_type": "roberta"}, "whose head is not that of a Bert; this version reads its encoder alone"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"id2label": {"0": "a"}}, "id2label names 1 labels of 5 outputs"),
        ({"id2label": {"0": "a", "1": "b", "2": "c", "3": "d", "9": "e"}}, "id2label names 5 labels of 5"),
        ({"id2label": {"0": 7}}, "id2label.0=7: input should be a valid string"),
        ({"classifier_dropout": 1.5}, "classifier_dropout=1.5: input should be less than 1"),
        ({"hidden_size": 40}, "they do not belong together"),
        ({"problem_type": "regression"}, "has a head with 5 outputs, and regression needs 1; save"),
        ({"problem_type": "other"}, "problem_type='other': input should be"),
        ({"bertscale": "no"}, "bertscale='no': input should be a valid dictionary"),
        ({"bertscale": {"max_length": 0}}, "bertscale.max_length=0: input should be greater than"),
    ],
)
def test_a_config_of_something_else_is_one_line(
    values: dict[str, Any], said: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    kind: TaskKind = "tokens" if "Token" in str(values) else "classification"
    written(tmp_path / "model", "bert", kind, tokenizer)
    edit(tmp_path / "model", **values)
    with pytest.raises(UserError) as error:
        read_all(tmp_path / "model")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "model") in str(error.value)


@pytest.mark.parametrize("lost", ["classifier.weight", "classifier.bias", "bert.pooler.dense.weight"])
def test_tensors_that_are_lost_are_named(lost: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    written(tmp_path / "model", "bert", "classification", tokenizer)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"lacks {lost}: it is not a complete task model; save"):
        read_all(tmp_path / "model")


def test_folders_without_a_task_model_are_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert not is_task_model(tmp_path / "none")
    with pytest.raises(UserError, match=r"none is no task model: it has no config\.json"):
        open_task_model(tmp_path / "none")
    written(tmp_path / "model", "bert", "regression", tokenizer)
    (tmp_path / "model" / "tokenizer.model").unlink()
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.model, tokenizer\.json or vocab\.txt"):
        open_task_model(tmp_path / "model").digest()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
        open_task_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("[")
    assert not is_task_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        open_task_model(tmp_path / "model")


def test_an_electra_with_embeddings_of_another_width_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    written(tmp_path / "model", "electra", "tokens", tokenizer)
    edit(tmp_path / "model", embedding_size=18)
    for opened in (open_task_model, open_encoder):
        with pytest.raises(
            UserError, match="embedding_size=18; this version reads an electra with embedding"
        ):
            opened(tmp_path / "model")


@pytest.mark.parametrize("kind", ["classification", "multiple_choice"])
@pytest.mark.parametrize("family", ["modern mean", "electra"])
def test_damaged_files_are_one_line(
    family: str, kind: TaskKind, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    written(tmp_path / "model", family, kind, tokenizer)

    def read() -> Any:
        encoder = open_encoder(tmp_path / "model")
        assert all(len(encoder.tensor(name)) for name in encoder.names)
        weights = open_task_model(tmp_path / "model")
        assert weights.max_length > 0
        assert json.dumps(weights.facts)
        return {name: weights.tensor(name).tolist() for name in weights.names}

    assert damage(tmp_path / "model" / "config.json", read, json_edit, 60) > 10
    assert damage(tmp_path / "model" / "model.safetensors", read, header_edit, 30) > 20


# ------------------------------------------------------------------------------------------------ encoders

HEAD = {
    "head.dense.weight": "predictions.dense.weight",
    "head.LayerNorm.weight": "predictions.LayerNorm.weight",
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "bert": {"preset": "bert"},
    "megatron-bert": {"preset": "megatron-bert"},
    "modern": {"preset": "modern"},
}


@pytest.mark.parametrize("preset", CHECKPOINTS)
def test_an_encoder_is_read_from_every_class_of_its_preset(
    preset: str, tiny_data: Path, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "checkpoint", tiny_data, CHECKPOINTS[preset])
    convert(tmp_path / "checkpoint", tmp_path / "exported", ConvertOptions(show=False))
    shutil.copytree(tmp_path / "exported", tmp_path / "plain")
    transformers.AutoModel.from_pretrained(tmp_path / "exported").save_pretrained(tmp_path / "plain")
    masked = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "exported")
    masked.save_pretrained(tmp_path / "masked")
    if preset != "modern":
        assert "embeddings.word_embeddings.weight" in load_file(tmp_path / "plain" / "model.safetensors")
    whole = open_checkpoint(tmp_path / "checkpoint")
    encoder = {name for name in whole.parameters if name.startswith("encoder.")}
    pooler = {name for name in encoder if "pooler" in name}
    head = set(HEAD) if preset == "modern" else set()
    for folder, names in {
        "checkpoint": encoder | head,
        "exported": encoder | head,
        "plain": encoder,
        "masked": (encoder - pooler if preset == "bert" else encoder) | head,
    }.items():
        weights = open_encoder(tmp_path / folder)
        found = set(weights.names)
        assert found - pooler == names - pooler, folder
        assert weights.model.model_copy(update={"sentence_head": whole.model.sentence_head}) == whole.model
        assert weights.vocab_size == VOCAB
        for name in found:
            assert weights.tensor(name).equal(whole.tensor(HEAD.get(name, name))), (folder, name)
    assert open_encoder(tmp_path / "plain").digest() == open_encoder(tmp_path / "plain").digest()
    assert open_encoder(tmp_path / "checkpoint").digest() == whole.digest()
    if preset != "modern":
        assert pooler <= set(open_encoder(tmp_path / "plain").names)


def test_a_new_head_of_modern_begins_as_in_transformers(tiny_data: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", tiny_data, {"preset": "modern"})
    convert(tmp_path / "checkpoint", tmp_path / "exported", ConvertOptions(show=False))
    auto = transformers.AutoModelForSequenceClassification
    _, loading = auto.from_pretrained(tmp_path / "exported", num_labels=3, output_loading_info=True)
    weights = open_encoder(tmp_path / "checkpoint")
    ours = TaskModel(weights.model, weights.vocab_size, HeadConfig("classification", 3))
    new = {name for name, _ in ours.named_parameters()} - set(weights.names)
    assert new == {"head.output.weight", "head.output.bias"}
    assert set(loading["missing_keys"]) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("share", [1 / 3, 1.0])
def test_an_encoder_with_a_generator_is_the_discriminator(
    share: float, tiny_data: Path, tmp_path: Path
) -> None:
    values = {"preset": "bert", "generator_size": share, "sentence_head": False}
    write_checkpoint(tmp_path / "checkpoint", tiny_data, values)
    convert(tmp_path / "checkpoint", tmp_path / "exported", ConvertOptions(show=False))
    transformers.AutoModel.from_pretrained(tmp_path / "exported").save_pretrained(tmp_path / "plain")
    whole = open_checkpoint(tmp_path / "checkpoint")
    for folder in ("checkpoint", "exported", "plain"):
        weights = open_encoder(tmp_path / folder)
        assert set(weights.names) == {name for name in whole.parameters if name.startswith("encoder.")}
        assert task_class(weights.model, "tokens") == "ElectraForTokenClassification"
        for name in weights.names:
            assert weights.tensor(name).equal(whole.tensor(name)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_model_gives_its_encoder(family: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = written(tmp_path / "model", family, "classification", tokenizer)
    weights = open_encoder(tmp_path / "model")
    parameters = dict(ours.named_parameters())
    wanted = {name for name in parameters if name.startswith("encoder.")}
    assert set(weights.names) == wanted | (set(HEAD) if family.startswith("modern") else set())
    for name in weights.names:
        assert weights.tensor(name).equal(parameters[name]), name


def test_encoders_that_are_none_are_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*none"):
        open_encoder(tmp_path / "none")
    written(tmp_path / "model", "bert", "classification", tokenizer)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    pooler = tensors.pop("bert.pooler.dense.bias")
    save_file(tensors, file, {"format": "pt"})
    # Half a pooler is a damaged file, none is an encoder.
    with pytest.raises(UserError, match=r"lacks bert\.pooler\.dense\.bias: it is not a complete encoder"):
        open_encoder(tmp_path / "model")
    tensors["bert.pooler.dense.bias"] = pooler
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks bert\.encoder\.layer\.1\.output\.dense\.weight"):
        open_encoder(tmp_path / "model")
    edit(tmp_path / "model", model_type="funnel")
    with pytest.raises(UserError, match="a model of type 'funnel'"):
        open_encoder(tmp_path / "model")
