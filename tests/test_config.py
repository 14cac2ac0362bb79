"""Configs: every file that is shipped loads, and every mistake is named."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from bertscale.config import (
    ClusterConfig,
    FinetuneConfig,
    PipelineConfig,
    PrepConfig,
    PretrainConfig,
    Section,
    UserError,
    check_config,
    describe_fields,
    load_config,
    load_phases,
)
from bertscale.config.section import ELSEWHERE
from bertscale.quickstart import stages

CONFIGS = Path(__file__).parents[1] / "configs"
SECTIONS: dict[str, type[Section]] = {
    "prep": PrepConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "cluster": ClusterConfig,
    "pipeline": PipelineConfig,
}

MINIMAL = "run: runs/a\ndata: runs/a/data\ntrain:\n  steps: 10\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.y*ml")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_every_shipped_config_loads(path: Path) -> None:
    section = SECTIONS[path.relative_to(CONFIGS).parts[0]]
    if section is PretrainConfig:
        load_phases(path, [])
    else:
        load_config(section, path, [])


@pytest.mark.parametrize("gpus", [0, 1, 2, 3])
def test_the_quickstart_s_overrides(gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stages pass on only keys that exist, and another run folder keeps out of the default one."""
    monkeypatch.chdir(CONFIGS.parent)
    sections: dict[str, type[Section]] = {
        "prep": PrepConfig,
        "pretrain": PretrainConfig,
        "finetune": FinetuneConfig,
    }
    for run in (Path("runs/quickstart"), tmp_path):
        for name, _, command in stages(run, gpus):
            if name in sections:
                overrides = [word for word in command[3:] if word != "--replace"]
                config = load_config(sections[name], command[2], overrides)
                assert ("runs/quickstart" in config.model_dump_json()) == (run != tmp_path), shlex.join(
                    command
                )


def test_defaults_file_and_overrides(minimal: Path) -> None:
    config = load_config(PretrainConfig, minimal, ["train.steps=20", "model.hidden_size=24", "data=b"])
    assert (config.train.steps, config.model.hidden_size, config.data, config.run) == (20, 24, "b", "runs/a")
    assert config.train.global_batch == 256


def write_chain(folder: Path) -> Path:
    """A config in a folder of its own, its base in another, and that one's base beside it."""
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    (folder / "b/ground.yaml").write_text(
        MINIMAL + "model: {hidden_size: 24, num_attention_heads: 2}\n"
        "optimizer: {learning_rate: 1.0e-3, beta2: 0.9}\nsamples: {warmup: [[5, 16], [5, 32]]}\n"
    )
    (folder / "b/middle.yaml").write_text(
        "base: ground.yaml\nmodel: {num_attention_heads: 4}\noptimizer:\n  beta2: 0.5\n"
    )
    top = folder / "a/top.yaml"
    top.write_text(
        "base: ../b/middle.yaml\nrun: runs/b\ntrain: {steps: null, tokens: 1000}\n"
        "samples: {warmup: [[7, 16]]}\n"
    )
    return top


def test_a_config_says_what_differs_from_its_base(tmp_path: Path) -> None:
    config = load_config(PretrainConfig, write_chain(tmp_path), ["optimizer.learning_rate=2.0e-3"])
    assert (config.run, config.data) == ("runs/b", "runs/a/data")
    assert (config.train.steps, config.train.tokens) == (None, 1000)  # null takes a value away
    assert (config.model.hidden_size, config.model.num_attention_heads) == (24, 4)
    assert (config.optimizer.learning_rate, config.optimizer.beta2) == (2e-3, 0.5)
    assert config.samples.warmup == [(7, 16)]  # a list replaces the other
    assert "base" not in config.model_dump()
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(PretrainConfig, resolved, []) == config


def test_other_kinds_of_configs_have_bases_too(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("gpus_per_node: 8\nenvironment: {A: a}\n")
    (tmp_path / "part.yaml").write_text("base: site.yaml\npartition: big\nenvironment: {B: b}\n")
    site = load_config(ClusterConfig, tmp_path / "part.yaml", [])
    assert (site.partition, site.gpus_per_node, site.environment) == ("big", 8, {"A": "a", "B": "b"})


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        (
            "b/ground.yaml",
            "base: ../a/top.yaml",
            ["b/ground.yaml: base='../a/top.yaml' closes a circle", "a/top"],
        ),
        ("b/ground.yaml", "base: ground.yaml", ["b/ground.yaml: base='ground.yaml' closes a circle"]),
        ("b/middle.yaml", "base: no.yaml", ["b/no.yaml (the base of ", "b/middle.yaml): No such file"]),
        (
            "b/middle.yaml",
            "base: [ground.yaml]",
            ["b/middle.yaml: base=['ground.yaml'] is not the path of one"],
        ),
        ("b/middle.yaml", "[1, 2]", ["b/middle.yaml (the base of ", "a/top.yaml) is not a mapping"]),
        (
            "b/ground.yaml",
            "train: {stepz: 1}",
            ["a/top.yaml, based on ", "ground.yaml: unknown key train.stepz"],
        ),
    ],
)
def test_a_base_that_is_none_is_refused(file: str, text: str, words: list[str], tmp_path: Path) -> None:
    top = write_chain(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError) as refused:
        load_config(PretrainConfig, top, [])
    for word in words:
        assert word in str(refused.value)


def test_a_base_is_no_override(minimal: Path) -> None:
    with pytest.raises(UserError, match=r"'base=x\.yaml': base belongs in the config file"):
        load_config(PretrainConfig, minimal, ["base=x.yaml"])


@pytest.mark.parametrize(
    ("text", "override", "lines"),
    [
        ("encoder: a\nlearning_rate: 1.0e-4\n", "", ["learning_rate is now optimizer.learning_rate"]),
        ("encoder: a\n", "batch=8", ["batch is now train.global_batch"]),
        (
            "train: a.jsonl\ntest: b.jsonl\nseeds: [1]\n",
            "train.epochs=3",
            ["train is now data.train", "test is now data.test", "seeds is now train.seeds"],
        ),
        ("data: {test: b}\n", "train=a.jsonl", ["train is now data.train"]),
    ],
)
def test_a_former_key_is_refused_with_the_present_one(
    text: str, override: str, lines: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        load_config(FinetuneConfig, path, [override] if override else [])
    assert str(refused.value).splitlines() == [f"{path}: {line}" for line in lines]


def test_every_former_key_has_a_present_one() -> None:
    present = {name for name, _ in describe_fields(FinetuneConfig)}
    assert set(FinetuneConfig.former_keys.values()) <= present
    assert not FinetuneConfig.former_keys.keys() & present


def test_the_former_folder_of_prep_s_configs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"configs/data is now configs/prep: take configs/prep/english\.yaml"):
        load_config(PrepConfig, "configs/data/english.yaml", [])
    (tmp_path / "configs/data").mkdir(parents=True)  # a person's own folder is as good as any
    (tmp_path / "configs/data/mine.yaml").write_text("input: [a.txt]\noutput: out\n")
    assert load_config(PrepConfig, "configs/data/mine.yaml", []).output == "out"


@pytest.mark.parametrize(("given", "slurm", "here"), [("null", 2, 0), ("5", 5, 5), ("0", 0, 0)])
def test_restarts_in_a_row(given: str, slurm: int, here: int, minimal: Path) -> None:
    launch = load_config(PretrainConfig, minimal, [f"launch.restarts_without_progress={given}"]).launch
    assert (launch.restarts_in_a_row(slurm=True), launch.restarts_in_a_row(slurm=False)) == (slurm, here)


def test_a_preset_has_its_own_defaults(minimal: Path) -> None:
    modern = load_config(
        PretrainConfig,
        minimal,
        ["model.preset=modern", "model.hidden_dropout_prob=0.2", "samples.kind=packed"],
    ).model
    assert (modern.layer_norm_eps, modern.sentence_head) == (1e-5, False)
    assert (modern.hidden_dropout_prob, modern.attention_probs_dropout_prob) == (0.2, 0.0)
    assert [modern.is_local(layer) for layer in range(4)] == [False, True, True, False]
    bert = load_config(PretrainConfig, minimal, []).model
    assert (bert.layer_norm_eps, bert.sentence_head, bert.hidden_dropout_prob) == (1e-12, True, 0.1)
    assert not any(bert.is_local(layer) for layer in range(4))
    for model in (modern, bert):  # as a checkpoint keeps it
        assert type(model).model_validate(model.model_dump()) == model


def test_an_override_is_yaml(tmp_path: Path) -> None:
    path = tmp_path / "prep.yaml"
    path.write_text("input: [a]\noutput: b\ntokenizer: c\n")
    config = load_config(PrepConfig, path, ["input=[x, y z]", "tokenizer=null", "text_field=a=b"])
    assert (config.input, config.tokenizer, config.text_field) == (["x", "y z"], None, "a=b")


def test_configs_are_frozen(minimal: Path) -> None:
    config = load_config(PretrainConfig, minimal, [])
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key train.stepz; did you mean train.steps?"),
        ("trian.steps=3", "unknown key trian; did you mean train?"),
        ("steps=3", "unknown key steps; did you mean train.steps?"),
        ("lr=3", "unknown key lr; did you mean optimizer.learning_rate?"),
        ("train.batch_size=3", "unknown key train.batch_size; did you mean train.global_batch?"),
        ("model.name=bert", "unknown key model.name; did you mean model.preset?"),
        ("train.zzz=3", "unknown key train.zzz; the keys here are steps, "),
        ("train.steps=many", "train.steps='many': input should be a valid integer"),
        ("train.steps=0", "train.steps=0: input should be greater than or equal to 1"),
        ("parallel.zero_stage=4", "parallel.zero_stage=4: input should be less than or equal to 3"),
        (
            "train.precision=float16",
            "train.precision='float16': input should be 'auto', 'bfloat16' or 'float32'",
        ),
        ("model.hidden_size=100", "hidden_size=100 is not a multiple of num_attention_heads=12"),
        (
            "model.local_attention=64",
            "local_attention=64 is a key of preset modern; preset bert does not use it",
        ),
        (
            "model={preset: modern, type_vocab_size: 3}",
            "type_vocab_size=3 is a key of preset bert and megatron-bert; preset modern does not use it",
        ),
        ("model={preset: modern, local_attention: 7}", "local_attention=7 is odd"),
        (
            "model={preset: modern}",
            "samples.kind=nsp makes sentence pairs, and model.preset=modern has no head",
        ),
        ("model={preset: modern, hidden_size: 36}", "gives heads of odd size 3"),
        (
            "model.preset=roberta",
            "model.preset='roberta': input should be 'bert', 'megatron-bert' or 'modern'",
        ),
        ("parallel.tensor=5", "parallel.tensor=5 does not divide model.num_attention_heads=12"),
        ("samples.max_length=513", "samples.max_length=513 is longer than model.max_position_embeddings=512"),
        ("samples.random_token_rate=0.5", "add up to more than 1"),
        ("train.global_batch=7", "train.global_batch=7 is odd"),
        ("train.schedule_steps=1", "schedule_steps=1 is less than steps="),
        ("train.keep_every=7", "keep_every=7 is no multiple of save_every="),
        ("train.tokens=1e9", "one of steps, tokens and hours is the budget, not steps=10 and tokens="),
        ("train.steps=null", "exactly one of steps, tokens and hours is the budget, not none"),
        ("train={hours: 1, schedule_steps: 5}", "schedule_steps=5 needs a budget in steps"),
        ("train.batch_warmup=[[5, 4], [5, 8]]", "tokens must grow from pair to pair"),
        ("train.batch_warmup=[[5, 3]]", "a batch of train.batch_warmup=3 is odd"),
        ("train.batch_warmup=[[5, 0]]", "a batch of 0 samples is empty"),
        ("optimizer.name=sgd", "input should be 'adamw', 'stable-adamw', 'lamb' or 'muon'"),
        ("optimizer.schedule=step", "input should be 'linear', 'cosine' or 'wsd'"),
        ("optimizer.momentum=0.9", "momentum=0.9 is only for name: muon"),
        ("optimizer.weight_norm_bounds=[0, 10]", "weight_norm_bounds=(0.0, 10.0) is only for name: lamb"),
        ("optimizer={name: lamb, weight_norm_bounds: [9, 1]}", "the first must be smaller"),
        ("optimizer.decay_fraction=0.5", "decay_fraction=0.5 is only for schedule: wsd"),
        ("optimizer={schedule: wsd, warmup_fraction: 0.9}", "add up to more than 1"),
    ],
)
def test_a_wrong_value_is_named(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(PretrainConfig, minimal, [override])
    (line,) = str(caught.value).splitlines()
    assert message in line
    assert str(minimal) in line


@pytest.mark.parametrize("override", ["train.steps", "=3", "--steps"])
def test_an_override_without_key_or_value(minimal: Path, override: str) -> None:
    with pytest.raises(UserError, match="is not of the form key=value, such as"):
        load_config(PretrainConfig, minimal, [override])


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("heldout={wiki:runs/wiki}", "{wiki: runs/wiki}, or give heldout.wiki=runs/wiki"),
        ("model={preset: modern, hidden_size:64}", "{hidden_size: 64}, or give model.hidden_size=64"),
        ("train={fills: [{a:b}]}", "{a: b}"),
    ],
)
def test_a_colon_without_a_blank_is_told(minimal: Path, override: str, remedy: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(PretrainConfig, minimal, [override])
    assert str(error.value) == f"{override!r}: YAML needs a blank after the colon: {remedy}"
    minimal.write_text("heldout: {wiki:DIR}\n")
    with pytest.raises(UserError, match=r"minimal.yaml: YAML needs a blank after the colon: \{wiki: DIR\}$"):
        load_config(PretrainConfig, minimal, [])
    minimal.write_text("run: a\ndata: b\ntrain:\n  steps:5\n")
    with pytest.raises(UserError, match=r"train='steps:5': .*; YAML needs a blank after the colon$"):
        load_config(PretrainConfig, minimal, [])


def test_an_override_inside_a_value(minimal: Path) -> None:
    with pytest.raises(UserError, match="run is a value, not a section"):
        load_config(PretrainConfig, minimal, ["run.folder=3"])
    with pytest.raises(UserError, match="the value is not YAML"):
        load_config(PretrainConfig, minimal, ["run=[a"])


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("run: a\ntrain: {steps: x}\n")
    with pytest.raises(UserError) as caught:
        load_config(PretrainConfig, path, [])
    lines = str(caught.value).splitlines()
    assert lines == [
        f"{path}: data is missing",
        f"{path}: train.steps='x': input should be a valid integer, unable to parse string as an integer",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: [a", "is not YAML"),
        (b"- a\n- b\n", "is not a mapping of keys to values"),
        (b"run: \xff\n", "it is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(PretrainConfig, path, [])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the config .*No such file"):
        load_config(PretrainConfig, tmp_path / "none.yaml", [])


@pytest.mark.parametrize("section", SECTIONS.values())
def test_every_field_is_described(section: type[Section]) -> None:
    for key, text in describe_fields(section):
        sentence = text.rpartition(" (")[0]
        assert sentence != "None", key
        assert sentence[0].isupper() or sentence.startswith("auto: "), key
        assert sentence.endswith("."), key


def test_names_of_other_tools_lead_to_keys_that_there_are() -> None:
    sections = (PretrainConfig, FinetuneConfig, PrepConfig, ClusterConfig)
    last = {name.split(".")[-1] for section in sections for name, _ in describe_fields(section)}
    for theirs, names in ELSEWHERE.items():
        assert set(names) <= last, theirs
        assert theirs not in last


def test_one_input_needs_no_list() -> None:
    for given in ("text", ["text"]):
        assert PrepConfig.model_validate({"input": given, "output": "data"}).input == ["text"]


def test_keys_of_former_finetunings_lead_to_the_present_ones() -> None:
    given = {"data": {"train": "a", "text_field": "b", "label_field": "c"}, "model": {"freeze_encoder": True}}
    with pytest.raises(UserError) as error:
        check_config(FinetuneConfig, {"encoder": "e", "output": "o", **given}, "my.yaml")
    assert str(error.value).splitlines() == [
        "my.yaml: unknown key data.text_field; did you mean data.text?",
        "my.yaml: unknown key data.label_field; did you mean data.label?",
        "my.yaml: unknown key model.freeze_encoder; did you mean model.freeze_layers?",
    ]
