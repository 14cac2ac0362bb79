"""Checkpoint -> Hugging Face -> checkpoint, and what transformers makes of the exported folder."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from dist import run_ranks
from safetensors.torch import load_file, save_file
from tiny import pretrain_config
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)

from bertscale.config import ModelConfig, UserError
from bertscale.convert.encoders import open_encoder
from bertscale.convert.hf_names import SENTENCE_HEAD
from bertscale.convert.model_shape import native_shapes
from bertscale.convert.sources import CheckpointSource
from bertscale.convert.weights import native_model, open_weights
from bertscale.export.convert import convert
from bertscale.export.hugging_face import targets_of, write_folders
from bertscale.export.native import native_outputs
from bertscale.export.options import SHARD_SIZE, ConvertOptions
from bertscale.export.output import RECORD
from bertscale.export.tensors import Rounding
from bertscale.export.verify import largest_difference
from bertscale.model.heads import HeadConfig, TaskModel
from bertscale.model.model import initial_value
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import open_checkpoint, write_whole


def train(data: str, folder: str) -> int:
    """Runs on each of two ranks: TP 2 x ZeRO-3."""
    from bertscale.pretrain.pretrain import pretrain

    return pretrain(pretrain_config(data, folder, parallel={"tensor": 2, "zero_stage": 3}))


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_ranks(__file__, "train", world=2, data=str(tiny_data), folder=str(folder))
    return folder


def write_exported(weights: Any, output: Path) -> None:
    source = CheckpointSource(weights)
    rounding = Rounding("float32", clamp=False)
    write_folders(source, targets_of(source, "pretraining"), output, rounding, SHARD_SIZE)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "exported"
    convert(run, folder, ConvertOptions(show=False))
    return folder


def test_there_and_back_is_bit_exact(run: Path, exported: Path, tmp_path: Path) -> None:
    convert(exported, tmp_path / "back", ConvertOptions(show=False))
    before, after = open_checkpoint(run), open_checkpoint(tmp_path / "back")
    assert set(before.parameters) == set(after.parameters)
    assert before.vocab_size == after.vocab_size == 330
    assert before.model == after.model
    for name in before.parameters:
        assert before.tensor(name).equal(after.tensor(name)), name


def test_transformers_gives_the_native_logits(run: Path, exported: Path, tiny_data: Path) -> None:
    model = AutoModelForPreTraining.from_pretrained(exported).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert type(model).__name__ == "BertForPreTraining"
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    texts = ["The cat finds some bread at 7.", "A small dog [MASK] the garden."]
    encoded = [tokenizer(text, "Every teacher likes an answer.", return_tensors="pt") for text in texts]
    ours = native_model(open_checkpoint(run))
    assert ours.seq_relationship is not None
    for inputs in encoded:
        ids, types = inputs["input_ids"][0], inputs["token_type_ids"][0]
        with torch.no_grad():
            hidden, pooled = ours.encoder(ids, types, torch.arange(len(ids)), (len(ids),))
            theirs = model(**inputs)
            torch.testing.assert_close(
                ours.predictions.logits(hidden)[:, :330], theirs.prediction_logits[0], rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(
                ours.seq_relationship(pooled), theirs.seq_relationship_logits, rtol=1e-5, atol=1e-5
            )


def test_masked_model_and_pipeline_load_the_folder_as_it_is(exported: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(exported)
    loaded = model.state_dict()["bert.embeddings.word_embeddings.weight"]
    assert loaded.equal(model.cls.predictions.decoder.weight)
    fill = pipeline("fill-mask", model=str(exported), tokenizer=str(exported), device="cpu")
    answers = fill("The cat [MASK] the garden at 9.")
    assert len(answers) == 5
    assert sum(answer["score"] for answer in answers) <= 1.0


def test_the_exported_tokenizer_is_the_native_one(exported: Path) -> None:
    native = load_tokenizer(exported / "tokenizer.model")
    fast = AutoTokenizer.from_pretrained(exported)
    text = "My neighbour remembers the long road at 42."
    assert fast(text)["input_ids"] == [native.cls_id, *native.encode([text])[0], native.sep_id]
    assert fast.mask_token_id == native.mask_id


def test_a_second_conversion_reuses_the_first_and_another_folder_is_not_overwritten(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bertscale: Command
) -> None:
    written = (exported / "model.safetensors").stat().st_mtime_ns
    convert(run, exported, ConvertOptions(show=False))
    assert "already converted" in capsys.readouterr().out
    assert (exported / "model.safetensors").stat().st_mtime_ns == written
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    result = bertscale("convert", str(run), str(tmp_path / "mine"))
    assert result.returncode == 2
    assert "thesis.txt in it was not written by `bertscale convert`" in result.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_what_cannot_be_converted_is_one_line(exported: Path, tmp_path: Path, bertscale: Command) -> None:
    (tmp_path / "unfinished").mkdir()
    result = bertscale("convert", str(tmp_path / "unfinished"), str(tmp_path / "out"))
    assert result.returncode == 2
    assert "is not a finished checkpoint" in result.stderr
    config = json.loads((exported / "config.json").read_text())
    (tmp_path / "funnel").mkdir()
    (tmp_path / "funnel" / "config.json").write_text(json.dumps({**config, "model_type": "funnel"}))
    result = bertscale("convert", str(tmp_path / "funnel"), str(tmp_path / "out"))
    assert result.returncode == 2
    assert "'funnel'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------ the other presets

SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 42,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    "bert without pairs": ({"preset": "bert", "sentence_head": False}, "BertForMaskedLM"),
    "megatron-bert": ({"preset": "megatron-bert"}, "MegatronBertForPreTraining"),
    "modern": (
        {
            "preset": "modern",
            "local_attention": 8,
            "global_attn_every_n_layers": 2,
            "local_rope_theta": 500.0,
        },
        "ModernBertForMaskedLM",
    ),
    "modern with pairs": ({"preset": "modern", "sentence_head": True}, "ModernBertForMaskedLM"),
}


def write_checkpoint(folder: Path, data: Path, values: dict[str, Any]) -> None:
    """First weights, no biases of zero, as a checkpoint."""
    model = ModelConfig.model_validate({**SIZES, **values})
    tokenizer = data / "tokenizer.model"
    table = {
        "model": model.model_dump(),
        "vocab_size": 330,
        "tokenizer_sha256": load_tokenizer(tokenizer).sha256,
        "data_digest": None,
        "config": None,
    }
    draw = torch.Generator().manual_seed(1)
    values_of = (
        (name, torch.randn(shape, generator=draw) * 0.3)
        if name.endswith("bias") or "LayerNorm" in name
        else (name, initial_value(name, shape, model, 330, 1))
        for name, shape in native_shapes(model, 330).items()
    )
    pairs = ((name, padding_is_zero(name, value)) for name, value in values_of)
    write_whole(folder, table, pairs, tokenizer)


def padding_is_zero(name: str, value: torch.Tensor) -> torch.Tensor:
    if name == "predictions.decoder.bias":
        value[330:] = 0.0
    return value


@pytest.mark.parametrize("case", PRESETS)
def test_every_preset_there_and_back(
    case: str, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, kind = PRESETS[case]
    write_checkpoint(tmp_path / "native", tiny_data, values)
    convert(tmp_path / "native", tmp_path / "hf", ConvertOptions(show=False))
    before = open_checkpoint(tmp_path / "native")
    assert largest_difference(before, tmp_path / "hf") < 1e-4
    auto = AutoModelForPreTraining if kind.endswith("PreTraining") else AutoModelForMaskedLM
    model = auto.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == kind
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "hf")).__name__ == kind.replace(
        "PreTraining", "MaskedLM"
    )
    fill = pipeline("fill-mask", model=str(tmp_path / "hf"), tokenizer=str(tmp_path / "hf"), device="cpu")
    assert len(fill("The cat [MASK] the garden at 9.")) == 5

    model.save_pretrained(tmp_path / "saved by transformers")
    config = json.loads((tmp_path / "saved by transformers" / "config.json").read_text())
    config["sentence_head"] = before.model.sentence_head if values["preset"] != "modern" else False
    (tmp_path / "saved by transformers" / "config.json").write_text(json.dumps(config))
    for folder in ("hf", "saved by transformers"):
        after = open_weights(tmp_path / folder)
        extra = {name for name in before.parameters if name.startswith(SENTENCE_HEAD)}
        lost = extra if values["preset"] == "modern" else set()
        assert set(before.parameters) - lost == set(after.parameters)
        assert before.model.model_copy(update={"sentence_head": False}) == after.model.model_copy(
            update={"sentence_head": False}
        )
        for name in after.parameters:
            assert before.tensor(name).equal(after.tensor(name)), name
    said = capsys.readouterr().out
    assert ("left out  encoder.pooler.weight, " in said) == (case == "modern with pairs")


# ------------------------------------------------------------------------------- models with a generator


@pytest.mark.parametrize(("share", "pairs"), [(1 / 3, False), (1.0, True)])
def test_a_generator_and_its_discriminator_become_electra(
    share: float, pairs: bool, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "native", tiny_data, {"generator_size": share, "sentence_head": pairs})
    convert(tmp_path / "native", tmp_path / "hf", ConvertOptions(show=True))
    before = open_checkpoint(tmp_path / "native")
    assert largest_difference(before, tmp_path / "hf") < 1e-4
    said = capsys.readouterr().out
    assert ("left out  encoder.pooler.weight, " in said) == pairs
    assert "[MASK]" in said
    judge = AutoModelForPreTraining.from_pretrained(tmp_path / "hf")
    guesser = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf" / "generator")
    assert type(judge).__name__ == "ElectraForPreTraining"
    assert type(guesser).__name__ == "ElectraForMaskedLM"
    assert guesser.get_output_embeddings().weight is guesser.get_input_embeddings().weight
    assert guesser.get_input_embeddings().weight.equal(judge.get_input_embeddings().weight)
    assert guesser.config.hidden_size == round(24 * share)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf" / "generator").mask_token == "[MASK]"
    # A change of one weight of either is noticed.
    for folder in (tmp_path / "hf", tmp_path / "hf" / "generator"):
        kept = (folder / "model.safetensors").read_bytes()
        tensors = load_file(folder / "model.safetensors")
        name = "electra.encoder.layer.1.attention.output.dense.weight"
        save_file({**tensors, name: 1.5 * tensors[name]}, folder / "model.safetensors", {"format": "pt"})
        assert largest_difference(before, tmp_path / "hf") > 1e-3
        (folder / "model.safetensors").write_bytes(kept)
    back = open_weights(tmp_path / "hf")
    assert back.model == before.model.model_copy(update={"sentence_head": False})
    for name in back.parameters:
        assert back.tensor(name).equal(padding_is_zero(name, before.tensor(name))), name

    encoder = open_encoder(tmp_path / "native")  # of fine-tuning
    classifier = TaskModel(before.model, 330, HeadConfig("classification", 2))
    values = {name: encoder.tensor(name) for name in encoder.names}
    missing, unexpected = classifier.load_state_dict(values, strict=False)
    # An electra's head has no pooler, which one that was trained with sentence pairs has.
    assert all(name.startswith("encoder.pooler.") for name in unexpected)
    assert all(not name.startswith("encoder.") for name in missing)


@pytest.mark.parametrize("preset", ["megatron-bert", "modern"])
def test_what_transformers_has_no_electra_for_is_refused(
    preset: str, tiny_data: Path, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "native", tiny_data, {"preset": preset, "generator_size": 1.0})
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "native", tmp_path / "hf", ConvertOptions(show=False))
    assert f"is a {preset} with a generator (generator_size=1)" in str(caught.value)
    assert "`bertscale finetune` reads the checkpoint itself" in str(caught.value)
    assert not (tmp_path / "hf").exists()
    assert open_encoder(tmp_path / "native").names


@pytest.mark.parametrize("preset", ["bert", "megatron-bert"])
def test_a_masked_language_model_gets_a_sentence_head(
    preset: str, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "native", tiny_data, {"preset": preset})
    convert(tmp_path / "native", tmp_path / "hf", ConvertOptions(show=False))
    AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "masked")
    config = json.loads((tmp_path / "masked" / "config.json").read_text())
    config.pop("sentence_head")  # as from somebody else
    (tmp_path / "masked" / "config.json").write_text(json.dumps(config))
    shutil.copyfile(tiny_data / "tokenizer.model", tmp_path / "masked" / "tokenizer.model")
    convert(tmp_path / "masked", tmp_path / "back", ConvertOptions(show=False))
    said = capsys.readouterr().out
    assert "missing   encoder.pooler.weight, encoder.pooler.bias, seq_relationship.weight" in said
    assert "set to initial values" in said
    before, after = open_checkpoint(tmp_path / "native"), open_checkpoint(tmp_path / "back")
    assert set(before.parameters) == set(after.parameters)
    for name in before.parameters:
        same = before.tensor(name).equal(after.tensor(name))
        assert same != name.startswith(SENTENCE_HEAD), name
    assert float(after.tensor("encoder.pooler.weight").std()) > 0.1


def test_names_of_the_oldest_exports_are_read(tiny_data: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "native", tiny_data, {})
    convert(tmp_path / "native", tmp_path / "hf", ConvertOptions(show=False))
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    norm = "LayerNorm"
    renamed = {
        name.replace(f"{norm}.weight", f"{norm}.gamma").replace(f"{norm}.bias", f"{norm}.beta"): value
        for name, value in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path)
    name = "encoder.layers.0.attention.LayerNorm.bias"
    assert open_weights(tmp_path / "hf").tensor(name).equal(open_checkpoint(tmp_path / "native").tensor(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias=True; this version converts bert and megatron-bert with gelu"),
        ({"hidden_activation": "silu"}, "modernbert with hidden_activation='gelu'"),
        ({"layer_types": ["sliding_attention"] * 3}, "in which the first and then every n-th layer"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type='yarn'"),
        ({"model_type": "funnel"}, "a model of type 'funnel'; this version converts bert"),
    ],
)
def test_a_modern_model_that_no_preset_equals_is_refused(
    change: dict[str, Any], message: str, tiny_data: Path, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "native", tiny_data, {"preset": "modern"})
    convert(tmp_path / "native", tmp_path / "hf", ConvertOptions(show=False))
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as caught:
        open_weights(tmp_path / "hf")
    (line,) = str(caught.value).splitlines()
    assert message in line
    assert str(path) in line


# ---------------------------------------------------------------------------- models that are not ours


def export_of(preset: str, data: Path, folder: Path) -> Path:
    write_checkpoint(folder / "native", data, {"preset": preset})
    convert(folder / "native", folder / "hf", ConvertOptions(show=False))
    (folder / "hf" / RECORD).unlink()  # as if transformers had saved it: what is changed in it is not noticed
    return folder / "hf"


@pytest.mark.parametrize(
    ("preset", "change"),
    [
        ("bert", {"tie_word_embeddings": False}),
        ("bert", {"position_embedding_type": "relative_key_query"}),
        ("bert", {"is_decoder": True}),
        ("bert", {"hidden_act": "relu"}),
        ("megatron-bert", {"add_cross_attention": True}),
        ("modern", {"tie_word_embeddings": False}),
        ("modern", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ],
    ids=str,
)
def test_settings_that_change_the_network_are_refused_by_name(
    preset: str, change: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    folder = export_of(preset, tiny_data, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as caught:
        convert(folder, tmp_path / "back", ConvertOptions(show=False))
    (line,) = str(caught.value).splitlines()
    assert f"{path}: {next(iter(change))}=" in line
    assert not (tmp_path / "back").exists()


def test_the_half_window_of_a_modern_model_is_read(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers sets local_attention by sliding_window where a config has both."""
    folder = export_of("modern", tiny_data, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sliding_window": 3}))
    convert(folder, tmp_path / "back", ConvertOptions(show=False))
    assert open_checkpoint(tmp_path / "back").model.local_attention == 6
    assert "verified  logits of the given and the imported model" in capsys.readouterr().out


def test_tensors_that_are_not_read_are_named(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_of("bert", tiny_data, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 2}))
    convert(folder, tmp_path / "back", ConvertOptions(show=False))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("left out"))
    assert "bert.encoder.layer.2.attention.self.query.weight" in line
    assert "layer.1." not in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value.mul(torch.inf).sub(torch.inf), "has values that are not finite"),
        (lambda value: value.to(torch.int8), "has the data type torch.int8"),
        (lambda value: value[:, :-1].contiguous(), "do not belong together"),
    ],
    ids=["nan", "int8", "shape"],
)
def test_weights_that_are_no_weights_are_refused(
    change: Any, words: str, tiny_data: Path, tmp_path: Path
) -> None:
    folder = export_of("bert", tiny_data, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    save_file({**tensors, name: change(tensors[name])}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=words):
        convert(folder, tmp_path / "back", ConvertOptions(show=False))
    assert not (tmp_path / "back").exists()


def test_a_decoder_of_its_own_is_noticed(tiny_data: Path, tmp_path: Path) -> None:
    """By its tensors: the config does not tell, and transformers unties what a file holds twice."""
    folder = export_of("bert", tiny_data, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    embeddings = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.weight"] = embeddings.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"decoder\.weight differs from bert\.embeddings\.word_embeddings"):
        convert(folder, tmp_path / "back", ConvertOptions(show=False))


@pytest.mark.parametrize("preset", ["bert", "modern"])
def test_an_export_holds_one_tensor_at_a_time(
    preset: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a tensor is read, only the one before, which was just written, may still be there."""
    write_checkpoint(tmp_path / "native", tiny_data, {"preset": preset})
    weights = open_weights(tmp_path / "native")
    read, live = weights.tensor, list[weakref.ref[Any]]()

    def tensor(name: str) -> torch.Tensor:
        assert sum(value() is not None for value in live) <= 1
        values = read(name).numpy().copy()  # lives as long as any view of the tensor
        live.append(weakref.ref(values))
        return torch.from_numpy(values)

    monkeypatch.setattr(type(weights), "tensor", lambda self, name: tensor(name))
    output = tmp_path / "output"
    output.mkdir()
    write_exported(weights, output)
    assert len(live) == len(weights.parameters)
    monkeypatch.undo()
    written = load_file(output / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in written.values())
    assert json.loads((output / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    "values", [{}, {"generator_size": 1.0, "sentence_head": False}], ids=["bert", "electra"]
)
def test_a_comparison_holds_one_model_at_a_time(
    values: dict[str, Any], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "native", tiny_data, values)
    weights = open_weights(tmp_path / "native")
    output = tmp_path / "output"
    output.mkdir()
    write_exported(weights, output)
    load, loaded = PreTrainedModel.from_pretrained.__func__, list[weakref.ref[Any]]()

    def none_is_left() -> bool:
        return all(model() is None for model in loaded)

    def from_pretrained(kind: type[PreTrainedModel], *args: Any, **keys: Any) -> Any:
        assert none_is_left()
        model = load(kind, *args, **keys)
        loaded.append(weakref.ref(model[0]))  # beside it, what was missing
        return model

    def native(*arguments: Any) -> Any:
        assert none_is_left()
        return native_outputs(*arguments)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr("bertscale.export.verify.native_outputs", native)
    assert largest_difference(weights, output) < 1e-4
    assert len(loaded) == (2 if "generator_size" in values else 1)
