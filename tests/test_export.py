"""What `bertscale convert` writes for others: classes, data types, files, keys that readers ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_convert import write_checkpoint
from transformers import AutoConfig, AutoModel, AutoTokenizer

from bertscale.config import UserError
from bertscale.convert.weights import open_weights
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions, parse_size
from bertscale.export.reference import SENTENCES, language_of
from bertscale.export.tensors import Rounding, divide
from bertscale.tokenizer import load_tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "megatron-bert": {"preset": "megatron-bert"},
    "modern": {"preset": "modern", "num_hidden_layers": 4, "global_attn_every_n_layers": 2},
    "electra": {"generator_size": 2 / 3, "sentence_head": False},
}
CLASSES = {
    "bert": {"masked-lm": "BertForMaskedLM", "encoder": "BertModel"},
    "megatron-bert": {"masked-lm": "MegatronBertForMaskedLM", "encoder": "MegatronBertModel"},
    "modern": {"masked-lm": "ModernBertForMaskedLM", "encoder": "ModernBertModel"},
    "electra": {"masked-lm": "ElectraForMaskedLM", "encoder": "ElectraModel"},
}


@pytest.fixture(scope="module")
def native(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("native")
    for kind, values in KINDS.items():
        write_checkpoint(folder / kind, tiny_data, values)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


# ------------------------------------------------------------------------------------------ the classes


@pytest.mark.parametrize("form", ["masked-lm", "encoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_class_is_loaded_without_a_missing_or_spare_key(
    kind: str, form: str, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command itself loads the class strictly, and compares: it would have refused."""
    convert(native / kind, tmp_path / "out", ConvertOptions(as_=form, show=False))
    assert (
        "verified  logits of the native and the exported model differ by at most" in capsys.readouterr().out
    )
    assert config_of(tmp_path / "out")["architectures"] == [CLASSES[kind][form]]
    names = load_file(tmp_path / "out/model.safetensors").keys()
    assert not any(name.startswith(("bert.", "model.", "electra.")) for name in names) or form == "masked-lm"
    pooled = [name for name in names if "pooler" in name]
    assert bool(pooled) == (form == "encoder" and kind in ("bert", "megatron-bert"))


def test_an_encoder_without_pooler_says_the_same(native: Path, tmp_path: Path) -> None:
    convert(native / "bert", tmp_path / "with", ConvertOptions(as_="encoder"))
    convert(native / "bert", tmp_path / "without", ConvertOptions(as_="encoder", pooler=False))
    ids = torch.tensor([[2, 17, 18, 3]])
    models = [
        AutoModel.from_pretrained(tmp_path / "with"),
        AutoModel.from_pretrained(tmp_path / "without", add_pooling_layer=False),
    ]
    with torch.no_grad():
        assert models[0](ids).last_hidden_state.equal(models[1](ids).last_hidden_state)


def test_a_folder_of_transformers_is_a_source(native: Path, tmp_path: Path) -> None:
    convert(native / "bert", tmp_path / "hf", ConvertOptions(show=False))
    convert(tmp_path / "hf", tmp_path / "encoder", ConvertOptions(as_="encoder"))
    before, after = (
        load_file(tmp_path / "hf/model.safetensors"),
        load_file(tmp_path / "encoder/model.safetensors"),
    )
    assert all(value.equal(before[f"bert.{name}"]) for name, value in after.items())
    with pytest.raises(UserError, match=r"encoder lacks predictions\.\S+, which BertForMaskedLM has"):
        convert(tmp_path / "encoder", tmp_path / "masked", ConvertOptions(as_="masked-lm"))
    assert not (tmp_path / "masked").exists()


# ------------------------------------------------------------------------------------ data types, files


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_in_shards(
    kind: str, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ConvertOptions(dtype="bfloat16", shard_size=20_000, show=False)
    convert(native / kind, tmp_path / "out", options)
    said = capsys.readouterr().out
    assert "verified  logits" in said
    assert "rounding  to bfloat16 moves them by at most" in said
    config = config_of(tmp_path / "out")
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    found = {file: load_file(tmp_path / "out" / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in found.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(
        value.nbytes for tensors in found.values() for value in tensors.values()
    )
    convert(native / kind, tmp_path / "whole", ConvertOptions(show=False, verify=False))
    assert "verified  not, as --no-verify was given" in capsys.readouterr().out
    for name, value in load_file(tmp_path / "whole/model.safetensors").items():
        assert found[index["weight_map"][name]][name].equal(value.bfloat16())


def test_what_float16_cannot_hold_is_refused_or_named(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = open_weights(native / "bert")
    read = weights.tensor

    def tensor(name: str) -> torch.Tensor:
        value = read(name)
        if name == "encoder.pooler.bias":
            value[:3] = torch.tensor([70_000.0, -1e9, 1e5])
        if name == "encoder.pooler.weight":
            value[:16] = 1e-9
        return value

    monkeypatch.setattr(type(weights), "tensor", lambda self, name: tensor(name))
    options = ConvertOptions(dtype="float16", show=False, verify=False)
    with pytest.raises(
        UserError, match=r"3 values are beyond its range: 3 of bert\.pooler\.dense\.bias"
    ) as error:
        convert(native / "bert", tmp_path / "out", options)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()
    clamped = ConvertOptions(dtype="float16", clamp=True, show=False, verify=False)
    convert(native / "bert", tmp_path / "out", clamped)
    said = capsys.readouterr().out
    assert "clamped   float16: 3 values are beyond its range: 3 of bert.pooler.dense.bias" in said
    assert "384 values are too small for it and became 0: 384 of bert.pooler.dense.weight" in said
    written = load_file(tmp_path / "out/model.safetensors")["bert.pooler.dense.bias"]
    assert written[:3].tolist() == [65504.0, -65504.0, 65504.0]


def test_rounding_keeps_what_is_not_finite() -> None:
    value = torch.tensor([float("inf"), float("nan"), 1e30, -1.0])
    rounded = Rounding("float16", clamp=False)(value)
    assert rounded[:1].tolist() == [float("inf")]
    assert rounded[1].isnan()
    assert rounded[2:].tolist() == [65504.0, -1.0]


def test_shards_are_filled_in_order() -> None:
    shapes = {name: torch.Size([size]) for name, size in {"a": 4, "b": 4, "c": 20, "d": 1}.items()}
    assert divide(shapes, 4, 32) == [["a", "b"], ["c"], ["d"]]
    assert divide(shapes, 2, 10**9) == [list(shapes)]
    assert [parse_size(text) for text in ("2GB", "1.5 MB", "7")] == [2 * 10**9, 1_500_000, 7]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pooling": "mean"}, "--pooling goes with --as sentence-transformers"),
        ({"as_": "sentence-transformers"}, "needs --pooling mean or --pooling first"),
        ({"as_": "pretraining", "pooler": True}, "--pooler goes with --as encoder or sentence-transformers"),
    ],
)
def test_options_of_another_form_are_refused(
    options: dict[str, Any], words: str, native: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        convert(native / "bert", tmp_path / "out", ConvertOptions(**options))


def test_another_form_or_data_type_is_another_output(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masked = ConvertOptions(as_="masked-lm", show=False)
    for options in (ConvertOptions(as_="encoder"), masked, ConvertOptions(as_="masked-lm", dtype="bfloat16")):
        convert(native / "bert", tmp_path / "out", options)
        assert "already converted" not in capsys.readouterr().out
        convert(native / "bert", tmp_path / "out", options)
        assert "already converted" in capsys.readouterr().out


# ------------------------------------------------------------------------------ keys that readers ask for

# What each reader asks of config.json without a default of its own, as its source has it:
# text-embeddings-inference backends/candle/src/models/bert.rs and modernbert.rs, router/src/lib.rs; vLLM
# vllm/model_executor/models/bert.py and modernbert.py (which asks for layer_norm_eps, too); llama.cpp
# conversion/bert.py and base.py; CTranslate2 python/ctranslate2/converters/transformers.py.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
READERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("text-embeddings-inference", "bert"): (
        *("architectures", "model_type", "max_position_embeddings", "pad_token_id", *SIZES),
        *("hidden_act", "hidden_dropout_prob", "type_vocab_size", "initializer_range", "layer_norm_eps"),
    ),
    ("text-embeddings-inference", "modern"): (
        *("architectures", "model_type", "max_position_embeddings", "hidden_activation", *SIZES),
        *("initializer_range", "initializer_cutoff_factor", "norm_eps", "norm_bias", "classifier_activation"),
        *(f"{role}_token_id" for role in ("pad", "eos", "bos", "cls", "sep")),
        *("global_rope_theta", "local_rope_theta", "attention_bias", "attention_dropout"),
        *("global_attn_every_n_layers", "local_attention"),
    ),
    ("vLLM", "bert"): (
        *("architectures", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_act"),
        *("position_embedding_type", *SIZES),
    ),
    ("vLLM", "modern"): (
        *("architectures", "max_position_embeddings", "norm_eps", "layer_norm_eps", "norm_bias", *SIZES),
        *("attention_bias", "mlp_bias", "deterministic_flash_attn", "global_attn_every_n_layers"),
        *("local_attention", "global_rope_theta", "local_rope_theta", "classifier_pooling"),
        *("classifier_bias", "layer_types", "rope_parameters"),
    ),
    ("llama.cpp", "bert"): (
        *("architectures", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", *SIZES),
    ),
    ("llama.cpp", "modern"): (
        *("architectures", "max_position_embeddings", "norm_eps", "local_attention", *SIZES),
        *("global_attn_every_n_layers", "rope_parameters", "global_rope_theta", "local_rope_theta"),
    ),
    ("CTranslate2", "bert"): ("position_embedding_type", "hidden_act", "layer_norm_eps", *SIZES),
}
KNOWN = {  # classes that a reader registers; CTranslate2 loads by AutoModel
    "text-embeddings-inference": ("BertModel", "ModernBertModel"),
    "vLLM": ("BertModel", "ModernBertModel"),
    "llama.cpp": ("BertModel", "ModernBertModel"),
    "CTranslate2": ("BertModel",),
}


@pytest.fixture(scope="module")
def encoders(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of the encoder of each preset."""
    folder = tmp_path_factory.mktemp("encoders")
    for kind in ("bert", "megatron-bert", "modern"):
        convert(native / kind, folder / kind, ConvertOptions(as_="encoder", verify=False))
    return folder


@pytest.mark.parametrize(("reader", "kind"), READERS)
def test_readers_find_their_keys(reader: str, kind: str, encoders: Path) -> None:
    config = config_of(encoders / kind)
    assert [key for key in READERS[reader, kind] if config.get(key) is None] == []
    assert config["architectures"][0] in KNOWN[reader]


@pytest.mark.parametrize("kind", ["bert", "megatron-bert", "modern"])
def test_special_ids_are_those_of_the_tokenizer(kind: str, encoders: Path) -> None:
    config, fast = config_of(encoders / kind), AutoTokenizer.from_pretrained(encoders / kind)
    for role in ("pad", "cls", "sep", "mask"):
        assert config[f"{role}_token_id"] == getattr(fast, f"{role}_token_id")
    loaded = AutoConfig.from_pretrained(encoders / kind)
    ids = (loaded.bos_token_id, loaded.eos_token_id)
    assert ids == ((fast.cls_token_id, fast.sep_token_id) if kind == "modern" else (None, None))


def test_rotary_bases_are_told_in_both_forms(encoders: Path) -> None:
    config = config_of(encoders / "modern")
    ropes = config["rope_parameters"]
    assert ropes["full_attention"]["rope_theta"] == config["global_rope_theta"]
    assert ropes["sliding_attention"]["rope_theta"] == config["local_rope_theta"]
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert config["layer_types"] == kinds
    assert config["norm_eps"] == config["layer_norm_eps"]


# ------------------------------------------------------------------------------- reference, card, vectors


def test_the_reference_is_what_the_class_says(encoders: Path) -> None:
    for kind in ("bert", "modern"):
        with safe_open(encoders / kind / "reference/reference.safetensors", framework="pt") as file:
            texts = json.loads(file.metadata()["texts"])
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        batch = AutoTokenizer.from_pretrained(encoders / kind)(
            texts, padding=True, truncation=True, return_tensors="pt"
        )
        assert batch["input_ids"].equal(found["input_ids"])
        assert batch["attention_mask"].equal(found["attention_mask"])
        with torch.no_grad():
            states = AutoModel.from_pretrained(encoders / kind).eval()(**batch).last_hidden_state
        mask = found["attention_mask"].unsqueeze(-1)
        torch.testing.assert_close(states * mask, found["last_hidden_state"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((states * mask).sum(1) / mask.sum(1), found["mean"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states[:, 0], found["first"], rtol=1e-4, atol=1e-5)
    # vLLM takes all safetensors files of the folder for weights.
    assert [path.name for path in (encoders / "bert").glob("*.safetensors")] == ["model.safetensors"]


def test_sentences_are_of_the_language_of_the_vocabulary(tiny_data: Path) -> None:
    assert language_of(load_tokenizer(tiny_data)) == "English"
    assert {len(texts) for texts in SENTENCES.values()} == {3}


def test_the_card_tells_what_is_known(encoders: Path) -> None:
    text = (encoders / "bert/README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: feature-extraction\ntags:\n")
    assert "| class in transformers | BertModel |" in text
    assert "330 pieces" in text
    assert str(encoders) not in text


@pytest.mark.parametrize(
    ("kind", "pooling", "normalize"), [("bert", "first", False), ("modern", "mean", True)]
)
@pytest.mark.filterwarnings("ignore")  # of the library's own changes of names
def test_sentence_transformers_gives_our_vectors(
    kind: str, pooling: Any, normalize: bool, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    options = ConvertOptions(as_="sentence-transformers", pooling=pooling, normalize=normalize)
    convert(native / kind, tmp_path / "out", options)
    said = capsys.readouterr().out
    assert "vectors   of sentence-transformers" in said
    assert "of the native model differ by at most" in said
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    vectors = torch.as_tensor(model.encode(["The cat finds some bread.", "A small dog."]))
    assert vectors.shape == (2, config_of(tmp_path / "out")["hidden_size"])
    if normalize:
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    # What text-embeddings-inference and sentence-transformers before 5.4 ask for.
    pooler = json.loads((tmp_path / "out/1_Pooling/config.json").read_text())
    assert pooler["word_embedding_dimension"] == vectors.shape[1]
    assert pooler["pooling_mode_cls_token"] == (pooling == "first")
    assert pooler["pooling_mode_mean_tokens"] == (pooling == "mean")
    longest = json.loads((tmp_path / "out/sentence_bert_config.json").read_text())["max_seq_length"]
    assert longest == config_of(tmp_path / "out")["max_position_embeddings"] == model.max_seq_length
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    modules = json.loads((tmp_path / "out/modules.json").read_text())
    assert [each["type"] for each in modules] == [f"sentence_transformers.models.{each}" for each in kinds]
