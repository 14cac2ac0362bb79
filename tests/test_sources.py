"""What a pretraining may start from: every class of transformers that is read, every form of its files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from bertscale.config import UserError
from bertscale.convert.encoders import open_encoder
from bertscale.convert.model_shape import native_shapes
from bertscale.convert.sources import InitSource, open_source_weights
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions
from bertscale.model.model import PretrainingModel
from bertscale.train.checkpoint import open_checkpoint

VOCAB = 61  # the native embedding has 67 rows more
BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 30,
    "max_position_embeddings": 19,
    "initializer_range": 0.2,
}
DISTILBERT = {
    "vocab_size": VOCAB,
    "dim": 24,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 30,
    "max_position_embeddings": 19,
    "initializer_range": 0.2,
}
ROBERTA = {**BERT, "max_position_embeddings": 21, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
ELECTRA = {**BERT, "embedding_size": 24}
MODERN = {
    **BERT,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "local_attention": 8,
    "pad_token_id": 0,
    **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
}
CONFIGS = {
    "Bert": BERT,
    "MegatronBert": BERT,
    "ModernBert": MODERN,
    "Roberta": ROBERTA,
    "XLMRoberta": {**ROBERTA, "type_vocab_size": 2, "pad_token_id": 4, "max_position_embeddings": 24},
    "Camembert": ROBERTA,
    "DistilBert": DISTILBERT,
    "Electra": ELECTRA,
}
POOLER = ["encoder.pooler.weight", "encoder.pooler.bias"]
MASKED = [f"predictions.{part}" for part in ("dense.weight", "dense.bias", "LayerNorm.weight")]
MASKED += ["predictions.LayerNorm.bias", "predictions.decoder.bias"]
# Class -> what is missing of our network (`generator`: all of it), and what is left out of theirs.
CLASSES: dict[str, tuple[list[str], list[str]]] = {
    "BertForPreTraining": ([], []),
    "BertForMaskedLM": ([], []),
    "BertModel": (MASKED, []),
    "BertForTokenClassification": (MASKED, ["classifier.bias", "classifier.weight"]),
    "BertForNextSentencePrediction": (MASKED, []),
    "MegatronBertForPreTraining": ([], []),
    "MegatronBertModel": (MASKED, []),
    "MegatronBertForQuestionAnswering": (MASKED, ["qa_outputs.bias", "qa_outputs.weight"]),
    "ModernBertForMaskedLM": ([], []),
    "ModernBertModel": ([*MASKED[:1], MASKED[2], MASKED[4]], []),
    "ModernBertForSequenceClassification": (
        [*MASKED[:1], MASKED[2], MASKED[4]],
        ["classifier.bias", "classifier.weight", "head.dense.weight", "head.norm.weight"],
    ),
    "RobertaForMaskedLM": ([], []),
    "RobertaModel": (MASKED, []),
    "RobertaForSequenceClassification": (
        MASKED,
        [f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("bias", "weight")],
    ),
    "XLMRobertaForMaskedLM": ([], []),
    "CamembertForMaskedLM": ([], []),
    "CamembertForTokenClassification": (MASKED, ["classifier.bias", "classifier.weight"]),
    "DistilBertForMaskedLM": ([], []),
    "DistilBertModel": (MASKED, []),
    "DistilBertForSequenceClassification": (
        MASKED,
        [f"{part}classifier.{kind}" for part in ("", "pre_") for kind in ("bias", "weight")],
    ),
    "ElectraForPreTraining": (["generator", *MASKED], []),
    "ElectraModel": (["generator", "detector", *MASKED], []),
    "ElectraForTokenClassification": (
        ["generator", "detector", *MASKED],
        ["classifier.bias", "classifier.weight"],
    ),
    "ElectraForMaskedLM": ([], []),
}


def random_model(kind: str, **values: Any) -> PreTrainedModel:
    """A model of a class of transformers, of which no parameter has the first value of another one."""
    (family,) = (each for each in CONFIGS if kind.startswith(each))
    config = getattr(transformers, f"{family}Config")(**{**CONFIGS[family], **values})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, kind)(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


def saved(folder: Path, kind: str, **values: Any) -> PreTrainedModel:
    """The same model, saved."""
    model = random_model(kind, **values)
    model.save_pretrained(folder)
    return model


def native(source: InitSource) -> PretrainingModel:
    """Our model with the weights of the source; those that it lacks are NaN, so that none of them is used."""
    model = PretrainingModel(source.model, source.vocab_size).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in source.missing:
                parameter.fill_(torch.nan)
            else:
                parameter.copy_(source.tensor(name))
    return model


def ask_native(model: PretrainingModel, ids: Tensor, types: Tensor) -> dict[str, Tensor]:
    """Hidden states and logits of one sample [T]."""
    inputs = (ids, types, torch.arange(len(ids)), (len(ids),))
    hidden, pooled = model.encoder(*inputs)
    found = {"hidden": hidden}
    if model.seq_relationship is not None:
        found["relation"] = model.seq_relationship(pooled)
    if model.detector is not None:
        found["detected"] = model.detector(hidden)
    if model.generator is not None:
        hidden, _ = model.generator(*inputs, model.encoder.embeddings)
    found["logits"] = model.predictions.logits(hidden)[:, :VOCAB]
    return found


def ask_theirs(model: PreTrainedModel, ids: Tensor, types: Tensor) -> dict[str, Tensor]:
    """The same of a model of transformers, as far as it has them."""
    inputs = {"input_ids": ids[None]}
    if getattr(model.config, "type_vocab_size", 1) > 1:
        inputs["token_type_ids"] = types[None]
    answers = model(**inputs, output_hidden_states=True)
    found = {"hidden": model.base_model(**inputs).last_hidden_state[0]}
    name = type(model).__name__
    if "prediction_logits" in answers:
        found["logits"], found["relation"] = answers.prediction_logits[0], answers.seq_relationship_logits
    elif name.endswith("MaskedLM"):
        found["logits"] = answers.logits[0]
    elif name == "ElectraForPreTraining":
        found["detected"] = answers.logits[0]
    elif name.endswith("NextSentencePrediction"):
        found["relation"] = answers.logits
    return found


@torch.no_grad()
def compare(source: InitSource, theirs: PreTrainedModel, leave: tuple[str, ...] = ()) -> None:
    """Logits where they have them, and hidden states; of the longest sample too."""
    ours = native(source)
    draw = torch.Generator().manual_seed(1)
    for length in (7, source.model.max_position_embeddings):
        ids = torch.randint(5, VOCAB, (length,), generator=draw)
        types = (torch.arange(length) > length // 2).long()
        found, wanted = ask_native(ours, ids, types), ask_theirs(theirs, ids, types)
        for name in wanted.keys() - set(leave):
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_gives_its_network(kind: str, tmp_path: Path) -> None:
    theirs = saved(tmp_path, kind)
    source = open_source_weights(tmp_path)
    missing, left_out = CLASSES[kind]
    shapes = native_shapes(source.model, source.vocab_size)
    assert source.missing == [name for name in shapes if name.startswith(tuple(missing) or "-")]
    assert source.left_out == left_out
    assert set(shapes) - set(source.missing) == set(source.names) & set(shapes)
    assert set(source.names) - set(shapes) <= set(POOLER)
    relates = any(part in kind for part in ("BertForPreTraining", "NextSentence"))
    assert source.model.sentence_head == relates
    assert source.vocab_size == VOCAB
    assert source.model.max_position_embeddings == 19
    pools = getattr(theirs.base_model, "pooler", None) is not None
    assert (set(POOLER) <= set(source.names)) == pools
    compare(source, theirs)
    for name in source.names:
        assert source.tensor(name).dtype == torch.float32
        assert name not in shapes or source.tensor(name).shape == shapes[name]


# ------------------------------------------------------------------------------------ forms of their files


def as_pickle(folder: Path, legacy: bool = False) -> None:
    """What save_pretrained wrote, as the pickles that were written before safetensors."""
    for file in sorted(folder.glob("*.safetensors")):
        new = file.with_name(file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin"))
        torch.save(load_file(file), new, _use_new_zipfile_serialization=not legacy)
        file.unlink()
    for index in folder.glob("*.index.json"):
        values = json.loads(index.read_text())
        values["weight_map"] = {
            name: file.replace("model", "pytorch_model").replace(".safetensors", ".bin")
            for name, file in values["weight_map"].items()
        }
        index.with_name("pytorch_model.bin.index.json").write_text(json.dumps(values))
        index.unlink()


def put_tokenizer(folder: Path) -> None:
    """A WordPiece vocabulary as large as the models."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += [f"{start}{chr(97 + number)}" for start in ("", "##") for number in range(26)]
    pieces += list(".,!?")
    (folder / "vocab.txt").write_text("\n".join(pieces[:VOCAB]) + "\n")


@pytest.mark.parametrize("form", ["one", "shards", "pickle", "old pickle", "pickle shards"])
def test_every_form_of_the_files_is_read(form: str, tmp_path: Path) -> None:
    model = random_model("RobertaForMaskedLM")
    model.save_pretrained(tmp_path, max_shard_size="8KB" if "shards" in form else "5GB")
    if "pickle" in form:
        as_pickle(tmp_path, legacy="old" in form)
    assert (len(list(tmp_path.glob("*-of-*"))) > 3) == ("shards" in form)
    source = open_source_weights(tmp_path)
    assert not source.missing
    assert not source.left_out
    compare(source, model)
    put_tokenizer(tmp_path)
    before = source.digest()
    assert source.tokenizer == tmp_path / "vocab.txt"
    shard = next(file for file in sorted(tmp_path.iterdir()) if file.suffix in (".bin", ".safetensors"))
    with open(shard, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert source.digest() != before


def test_names_of_old_versions_copies_and_buffers_are_read(tmp_path: Path) -> None:
    theirs = saved(tmp_path, "BertForMaskedLM")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["bert.embeddings.position_ids"] = torch.arange(19)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_source_weights(tmp_path)
    assert not source.missing
    assert not source.left_out
    compare(source, theirs)
    tensors["cls.predictions.decoder.weight"] *= 2
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"model\.safetensors: cls\.predictions\.decoder\.weight differs from"
    ):
        open_source_weights(tmp_path)


class Code:
    """What a pickle must not do: make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_damaged_files_are_one_line_that_names_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = random_model("DistilBertForMaskedLM")

    def read() -> list[Tensor]:
        source = open_source_weights(folder)
        return [source.tensor(name) for name in source.names]

    def refused(*words: str) -> None:
        with pytest.raises(UserError) as error:
            read()
        (line,) = str(error.value).splitlines()
        for word in words:
            assert word in line

    model.save_pretrained(folder, max_shard_size="8KB")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    lost = folder / "model-00002-of-00006.safetensors"
    content = lost.read_bytes()
    lost.unlink()
    refused(str(index), f"it names the file {lost.name}, which is not there")
    lost.write_bytes(content[:-8])
    refused(f"cannot read {lost}")
    lost.write_bytes(content)
    name = next(name for name, file in values["weight_map"].items() if file != lost.name)
    moved = {**values, "weight_map": {**values["weight_map"], name: lost.name}}
    index.write_text(json.dumps(moved))
    refused(str(lost), f"says that it holds {name}, and it does not")
    index.write_text(json.dumps({"weight_map": {name: "../elsewhere.safetensors"}}))
    refused(str(index), "weight_map")
    index.write_text(json.dumps({"weight_map": {}}))
    refused(str(index), "weight_map")
    index.write_text(json.dumps(values))
    bias = "distilbert.transformer.layer.1.attention.q_lin.bias"
    shard = folder / values["weight_map"][bias]
    tensors = load_file(shard)
    save_file({**tensors, bias: tensors[bias][:-1]}, shard)
    refused(str(shard), bias, "they do not belong together")
    save_file({**tensors, bias: tensors[bias] * torch.inf}, shard)
    refused(str(shard), "has values that are not finite")
    del values["weight_map"][bias]
    index.write_text(json.dumps(values))
    refused(str(index), f"lacks {bias}: it is not a complete encoder")

    for file in folder.glob("model*"):
        file.unlink()
    refused(f"cannot read {folder / 'model.safetensors'}: there is no such file, nor a pytorch_model.bin")
    pickle = folder / "pytorch_model.bin"
    for legacy in (False, True):
        torch.save(model.state_dict(), pickle, _use_new_zipfile_serialization=not legacy)
        pickle.write_bytes(pickle.read_bytes()[:-4000])
        refused(f"{pickle} is damaged: it is not a whole file of torch.save")
        values = {**model.state_dict(), "code": Code(tmp_path / "made")}
        torch.save(values, pickle, _use_new_zipfile_serialization=not legacy)
        refused(
            f"cannot read {pickle}: it holds more than tensors, and code in a file of weights is never run"
        )
        assert not (tmp_path / "made").exists()
    torch.save({"state_dict": model.state_dict()}, pickle)
    refused(f"cannot read {pickle}: it is no table of tensors by their names")


# ------------------------------------------------------------------------------------------- ELECTRA


def test_an_electra_and_its_generator_are_one_source(tmp_path: Path) -> None:
    judge = saved(tmp_path, "ElectraForPreTraining")
    narrow = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 10}
    guesser = random_model("ElectraForMaskedLM", **narrow)
    shared = {name: value for name, value in judge.state_dict().items() if ".embeddings." in name}
    guesser.load_state_dict(shared, strict=False)
    guesser.save_pretrained(tmp_path / "generator")
    source = open_source_weights(tmp_path)
    assert source.model.generator_size == pytest.approx(1 / 3)
    assert not source.missing
    assert not source.left_out
    assert source.names == list(native_shapes(source.model, VOCAB))
    compare(source, judge)
    compare(source, guesser, leave=("hidden",))
    put_tokenizer(tmp_path)
    assert source.digest() == open_source_weights(tmp_path).digest()

    alone = open_source_weights(tmp_path / "generator")
    assert alone.model == source.model
    assert {name.split(".")[0] for name in alone.missing} == {"encoder", "detector"}
    assert all(name.startswith(("encoder.layers.", "detector.")) for name in alone.missing)
    for name in alone.names:
        assert alone.tensor(name).equal(source.tensor(name)), name

    before = json.loads((tmp_path / "generator" / "config.json").read_text())
    for key, value, words in (
        ("num_hidden_layers", 1, "num_hidden_layers=1; this version has only generators whose shape follows"),
        ("embedding_size", 12, "embedding_size=12, and the discriminator has hidden_size=24"),
    ):
        (tmp_path / "generator" / "config.json").write_text(json.dumps({**before, key: value}))
        with pytest.raises(UserError, match=words):
            open_source_weights(tmp_path)
    random_model("ElectraForMaskedLM", **narrow).save_pretrained(tmp_path / "generator")
    with pytest.raises(
        UserError, match=r"differ in encoder\.embeddings\..* have the same embeddings; remove"
    ):
        open_source_weights(tmp_path)
    judge.save_pretrained(tmp_path / "generator")
    with pytest.raises(UserError, match="it is not the generator of"):
        open_source_weights(tmp_path)


# ---------------------------------------------------------------------------------- networks beyond ours


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("BertModel", {"position_embedding_type": "relative_key"}),
        ("BertModel", {"hidden_act": "gelu_new"}),
        ("BertModel", {"is_decoder": True}),
        ("BertModel", {"add_cross_attention": True}),
        ("RobertaModel", {"is_decoder": True}),
        ("RobertaModel", {"max_position_embeddings": 2}),
        ("RobertaModel", {"pad_token_id": -1}),
        ("DistilBertModel", {"activation": "relu"}),
        ("DistilBertModel", {"n_heads": 5}),
        ("DistilBertModel", {"dim": "wide"}),
        ("ElectraModel", {"embedding_size": 12}),
        ("ElectraForMaskedLM", {"embedding_size": 12}),
        ("ModernBertModel", {"hidden_activation": "silu"}),
        ("BertModel", {"model_type": "funnel"}),
    ],
    ids=str,
)
def test_what_our_network_cannot_express_is_refused_by_name(
    kind: str, change: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((models[kind] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "model.safetensors").symlink_to(models[kind] / "model.safetensors")
    with pytest.raises(UserError) as error:
        open_source_weights(tmp_path)
    (line,) = str(error.value).splitlines()
    assert str(tmp_path / "config.json") in line
    (key,) = change
    assert {"model_type": "of type 'funnel'", "n_heads": "num_attention_heads=5"}.get(key, key) in line


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = ("BertModel", "RobertaModel", "DistilBertModel", "ElectraModel", "ElectraForMaskedLM")
    folder = tmp_path_factory.mktemp("models")
    for kind in (*kinds, "ModernBertModel"):
        saved(folder / kind, kind)
    return {kind: folder / kind for kind in (*kinds, "ModernBertModel")}


# ------------------------------------------------------------------------------- conversion, fine-tuning


@pytest.mark.parametrize("kind", ["RobertaForMaskedLM", "DistilBertForMaskedLM"])
def test_an_import_and_its_export_are_the_source(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = random_model(kind)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    as_pickle(tmp_path / "theirs")
    put_tokenizer(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "checkpoint", ConvertOptions(show=False))
    assert "verified  logits" in capsys.readouterr().out
    folder, checkpoint = (
        open_source_weights(tmp_path / "theirs"),
        open_source_weights(tmp_path / "checkpoint"),
    )
    assert checkpoint.model == folder.model
    assert checkpoint.names == folder.names == list(open_checkpoint(tmp_path / "checkpoint").parameters)
    assert checkpoint.missing == checkpoint.left_out == []
    assert checkpoint.digest()
    assert checkpoint.tokenizer.parent == tmp_path / "checkpoint"
    for name in folder.names:
        assert checkpoint.tensor(name).equal(folder.tensor(name)), name
    convert(tmp_path / "checkpoint", tmp_path / "exported", ConvertOptions(show=False))
    again = open_source_weights(tmp_path / "exported")
    compare(again, theirs)
    for name in folder.names:
        assert again.tensor(name).equal(folder.tensor(name)), name
    auto = transformers.AutoModelForMaskedLM
    _, loading = auto.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not loading["missing_keys"]


@pytest.mark.parametrize("kind", ["RobertaModel", "CamembertForTokenClassification", "DistilBertModel"])
def test_a_fine_tuning_begins_with_the_same_encoder(kind: str, tmp_path: Path) -> None:
    saved(tmp_path, kind)
    as_pickle(tmp_path)
    source, encoder = open_source_weights(tmp_path), open_encoder(tmp_path)
    assert encoder.model == source.model
    assert set(encoder.names) == set(source.names)
    for name in source.names:
        assert encoder.tensor(name).equal(source.tensor(name)), name


IMPORTED = [kind for kind in CLASSES if kind != "ElectraForMaskedLM" and not kind.startswith("Camembert")]


@pytest.mark.parametrize("kind", IMPORTED)
def test_every_class_is_imported(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a class lacks of the heads gets first values, its own head is left out, and both are named."""
    saved(tmp_path / "theirs", kind)
    put_tokenizer(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", ConvertOptions(show=False))
    said = capsys.readouterr().out
    source, found = open_source_weights(tmp_path / "theirs"), open_checkpoint(tmp_path / "ours")
    has_logits = kind.endswith(("ForPreTraining", "ForMaskedLM"))
    assert f"verified  {'logits' if has_logits else 'hidden states'} of the given and the imported" in said
    wanted = native_shapes(found.model, VOCAB)
    assert set(found.parameters) == set(wanted)
    new = [name for name in wanted if name not in source.names]
    # A bert has a head for sentence pairs unless its config says otherwise, an ELECTRA a generator.
    assert found.model.sentence_head == kind.startswith(("Bert", "MegatronBert"))
    assert found.model.generator_size == (pytest.approx(1 / 3) if kind.startswith("Electra") else None)
    for name in wanted:
        expected = source.tensor(name) if name in source.names else None
        assert expected is None or found.tensor(name).equal(expected), name
    assert ("missing   " in said) == bool(new)
    assert not new or f"missing   {', '.join(new)}: not in the source" in said
    unused = [name for name in source.names if name not in wanted]
    left_out = [*source.left_out, *unused]
    assert not left_out or f"left out  {', '.join(left_out)}: no parameter" in said


def test_a_pair_is_imported_and_a_generator_alone_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = saved(tmp_path / "pair", "ElectraForPreTraining")
    guesser = random_model("ElectraForMaskedLM", hidden_size=8, num_attention_heads=1, intermediate_size=10)
    shared = {name: value for name, value in judge.state_dict().items() if ".embeddings." in name}
    guesser.load_state_dict(shared, strict=False)
    guesser.save_pretrained(tmp_path / "pair" / "generator")
    put_tokenizer(tmp_path / "pair")
    convert(tmp_path / "pair", tmp_path / "ours", ConvertOptions(show=False))
    said = capsys.readouterr().out
    assert "verified  logits of the given and the imported model" in said
    assert "missing" not in said
    compare(open_source_weights(tmp_path / "ours"), judge)
    compare(open_source_weights(tmp_path / "ours"), guesser, leave=("hidden",))
    put_tokenizer(tmp_path / "pair" / "generator")
    with pytest.raises(UserError, match=r"lacks encoder\.layers\..*a generator without its discriminator"):
        convert(tmp_path / "pair" / "generator", tmp_path / "alone", ConvertOptions(show=False))
