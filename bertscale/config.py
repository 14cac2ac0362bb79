"""Every config section, declared once: defaults <- YAML <- `key=value`, checked before anything starts.

config = load_config(PretrainConfig, "configs/pretrain/quickstart.yaml", ["train.steps=100"])
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bertscale.errors import UserError as UserError  # the name that the rest of the code imports


class Section(BaseModel):
    """A part of a config: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# ---------------------------------------------------------------------------------------------- prep

_ISO_639_1 = (
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de "
    "dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id "
    "ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu "
    "lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu "
    "rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to "
    "tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)
LANGUAGES = (*_ISO_639_1.split(), "lines")
_LANGUAGE_NAMES = {  # what people write for some codes
    "arabic": "ar", "cn": "zh", "chinese": "zh", "dutch": "nl", "english": "en", "french": "fr",
    "german": "de", "hindi": "hi", "italian": "it", "japanese": "ja", "jp": "ja", "korean": "ko",
    "portuguese": "pt", "russian": "ru", "spanish": "es", "swedish": "sv",
}  # fmt: skip


def check_language(language: str) -> str:
    """`language`, an ISO 639-1 code also with a region or script (pt-BR), or `lines`.

    Raises ValueError that names the nearest codes.
    """
    code = language.lower().replace("_", "-").split("-")[0]
    if code not in LANGUAGES:
        known = (*LANGUAGES, *_LANGUAGE_NAMES)
        near = [
            _LANGUAGE_NAMES.get(name, name)
            for name in difflib.get_close_matches(code, known, n=3, cutoff=0.6)
        ]
        guess = f"; the nearest known: {', '.join(dict.fromkeys(near))}" if near else ""
        raise ValueError(
            f"{language!r} is no ISO 639-1 code of a language, such as en or zh, nor lines{guess}"
        )
    return language


SCRIPTS = (
    "latin", "cyrillic", "greek", "han", "kana", "hangul", "arabic", "hebrew", "devanagari", "thai",
)  # fmt: skip


class TokenizerTraining(Section):
    """How a SentencePiece model is trained."""

    model: Literal["unigram", "bpe"] = Field("unigram", description="Kind of SentencePiece model.")
    vocab_size: int = Field(32_768, ge=300, description="Number of pieces, special and byte pieces included.")
    sample_documents: int = Field(
        200_000, ge=1, description="At most this many documents, drawn at random, train the tokenizer."
    )
    character_coverage: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the text's characters that get pieces, the rarest others are spelt in bytes; "
        "by itself 0.9995, for text with Chinese or Japanese characters 0.9998.",
    )


class PrepConfig(Section):
    """Raw text -> tokenizer and Arrow token shards."""

    input: list[str] = Field(
        min_length=1,
        description="Files, folders or globs: .txt, .md, .jsonl, .csv, .tsv, .parquet, .arrow and "
        "WikiExtractor output, each also as .gz, .bz2, .xz or .zst.",
    )
    output: str = Field(description="Folder for the tokenizer, the shards and manifest.json.")
    text_field: str = Field("text", description="Name of the text's field or column.")
    documents: Literal["blank_line", "file"] = Field(
        "blank_line", description="What ends a document of a .txt file: a blank line, or the file's end."
    )
    language: str = Field(
        "en", description="Language of the text (ISO 639-1), which sentences are split by; `lines`: by lines."
    )
    normalization: Literal["nfc", "nfkc"] = Field("nfc", description="Unicode normalisation.")
    min_characters: int = Field(1, ge=1, description="Shorter documents are dropped and counted.")
    max_characters: int | None = Field(None, ge=1, description="Longer documents are dropped and counted.")
    min_letters: float = Field(
        0, ge=0, le=1, description="Documents with a smaller share of letters are dropped and counted."
    )
    scripts: list[str] = Field(
        [], description="Scripts such as latin, han or cyrillic; documents mostly in others are dropped."
    )
    deduplicate: bool = Field(True, description="Of documents with the same text only the first is kept.")
    tokenizer: str | None = Field(
        None,
        description="An existing SentencePiece model, or the vocab.txt of a WordPiece tokenizer; without it "
        "one is trained on the input.",
    )
    lowercase: bool | None = Field(
        None,
        description="Whether a WordPiece tokenizer lowers case and strips accents; by itself, if no piece of "
        "its vocabulary has a capital letter.",
    )
    train_tokenizer: TokenizerTraining = Field(
        default_factory=lambda: TokenizerTraining(), description="How a tokenizer is trained."
    )
    validation_fraction: float = Field(
        0.01, ge=0, lt=1, description="Share of documents, chosen by a hash of their text, held out."
    )
    split_bytes: int = Field(
        128 * 2**20,
        ge=1000,
        description="Input is cut, between documents, about every so many bytes, one process at a time.",
    )
    shard_bytes: int = Field(
        128 * 2**20, ge=1000, description="A shard holds about so many bytes of tokens, of all the input."
    )
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="The run fails at its end above this share of unreadable records."
    )
    workers: int = Field(0, ge=0, description="Worker processes; 0 takes one for each core.")
    seed: int = Field(0, ge=0, description="Seed of the order of documents and of the tokenizer's sample.")

    @field_validator("language")
    @classmethod
    def _check_language(cls, language: str) -> str:
        return check_language(language)

    @field_validator("scripts")
    @classmethod
    def _check_scripts(cls, scripts: list[str]) -> list[str]:
        for script in scripts:
            if script not in SCRIPTS:
                near = difflib.get_close_matches(script.lower(), SCRIPTS, 1)
                hint = f"did you mean {near[0]}?" if near else f"the scripts are {', '.join(SCRIPTS)}"
                raise ValueError(f"there is no script {script!r}; {hint}")
        return scripts


# ------------------------------------------------------------------------------------------ pretrain


class ModelConfig(Section):
    """Shape of the encoder; the names are those of Hugging Face's configs.

    A key that the preset has no use for is refused unless it has its default; defaults that differ by
    preset are in `PRESET_DEFAULTS`.
    """

    preset: Literal["bert", "megatron-bert", "modern"] = Field(
        "bert", description="Architecture: BertForPreTraining, MegatronBertForPreTraining or ModernBert."
    )
    num_hidden_layers: int = Field(12, ge=1, description="Layers.")
    hidden_size: int = Field(768, ge=1, description="Width of the residual stream.")
    num_attention_heads: int = Field(12, ge=1, description="Attention heads.")
    intermediate_size: int = Field(
        3072, ge=1, description="Width inside the feed-forward part; of each half where it is gated (modern)."
    )
    max_position_embeddings: int = Field(512, ge=1, description="Longest sequence, in tokens.")
    type_vocab_size: int = Field(2, ge=1, description="Segment types; not for modern.")
    hidden_dropout_prob: float = Field(
        0.1, ge=0, lt=1, description="Dropout of hidden states; modern: of embeddings and feed-forward, 0."
    )
    attention_probs_dropout_prob: float = Field(
        0.1, ge=0, lt=1, description="Dropout of attention; modern: of its output as well, 0."
    )
    layer_norm_eps: float = Field(
        1e-12, gt=0, description="Added to the variance by LayerNorm (norm_eps of modern: 1e-5)."
    )
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of initial weights.")
    matrix_initializer_range: float | None = Field(
        None, gt=0, description="Likewise, of matrices that are no embeddings; without it the same."
    )
    initializer_cutoff_factor: float = Field(
        2.0, gt=0, description="Initial weights are cut off at so many deviations; modern alone."
    )
    global_attn_every_n_layers: int = Field(
        3, ge=1, description="Every so-manieth layer attends to the whole sample, the first one too; modern."
    )
    local_attention: int = Field(
        128, ge=2, description="Window of the other layers in tokens, half to each side; modern alone."
    )
    global_rope_theta: float = Field(
        160_000.0, gt=1, description="Base of the rotary positions of global layers; modern alone."
    )
    local_rope_theta: float = Field(10_000.0, gt=1, description="Likewise, of local layers.")
    sentence_head: bool = Field(
        True, description="A pooler and a head for an objective on sentence pairs; modern: false."
    )
    generator_size: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Width of the generator of replaced-token detection as a share of the encoder's; without "
        "it there is none.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(preset := values.get("preset"), str):
            return {**PRESET_DEFAULTS.get(preset, {}), **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        modern = self.preset == "modern"
        for key in ("type_vocab_size",) if modern else MODERN_KEYS:
            value, default = getattr(self, key), type(self).model_fields[key].default
            if value != default:
                home = "bert and megatron-bert" if modern else "modern"
                raise ValueError(
                    f"{key}={value} is a key of preset {home}; preset {self.preset} has no use for it"
                )
        if modern and (size := self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} over num_attention_heads={self.num_attention_heads} is a "
                f"head of odd size, {size}; rotary positions take features in pairs"
            )
        if modern and self.local_attention % 2:
            raise ValueError(f"local_attention={self.local_attention} is odd: half of it lies to each side")
        if self.generator_size is not None:
            heads, inside = self.num_attention_heads, self.intermediate_size
            fit = [n for n in range(1, heads + 1) if inside * n % heads == 0]
            rounding = abs(self.generator_size * heads - self.generator_heads)
            if self.generator_heads not in fit or rounding > 0.01:
                raise ValueError(
                    f"generator_size={self.generator_size} of num_attention_heads={heads} and "
                    f"intermediate_size={inside} is no whole number; shares that are: "
                    f"{', '.join(f'{n / heads:.4g}' for n in fit)}"
                )
        return self

    @property
    def generator_heads(self) -> int:
        """Attention heads of the generator; 0 without one. They are as wide as the encoder's."""
        return round((self.generator_size or 0) * self.num_attention_heads)

    @property
    def generator(self) -> ModelConfig | None:
        """The shape of the generator of replaced-token detection, which reads the encoder's embeddings."""
        if self.generator_size is None:
            return None
        heads = self.generator_heads
        sizes = {
            "num_attention_heads": heads,
            "hidden_size": self.hidden_size * heads // self.num_attention_heads,
            "intermediate_size": self.intermediate_size * heads // self.num_attention_heads,
        }
        return self.model_copy(update={**sizes, "sentence_head": False, "generator_size": None})

    @property
    def half_window(self) -> int | None:
        """Tokens to each side that a local layer attends to; None: there is no local layer."""
        local = self.preset == "modern" and self.num_hidden_layers > 1 and self.global_attn_every_n_layers > 1
        return self.local_attention // 2 if local else None

    def is_local(self, layer: int) -> bool:
        """Whether layer number `layer`, from 0, attends to a window only."""
        return self.half_window is not None and layer % self.global_attn_every_n_layers > 0


MODERN_KEYS = (
    "initializer_cutoff_factor",
    "global_attn_every_n_layers",
    "local_attention",
    "global_rope_theta",
    "local_rope_theta",
)
# What a preset has where a config is silent and the field's own default is another preset's.
PRESET_DEFAULTS: dict[str, dict[str, Any]] = {
    "modern": {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-5,
        "sentence_head": False,
    }
}


class Corpus(Section):
    """One of several data sets that are mixed."""

    path: str = Field(description="Output folder of `bertscale prep`.")
    weight: float = Field(1.0, gt=0, description="Its share of the samples, relative to the others'.")


PAIRS = ("nsp", "sop")  # kinds of samples of two segments, which a second head tells apart


class SamplesConfig(Section):
    """How training samples are made of documents."""

    kind: Literal["nsp", "sop", "document", "packed"] = Field(
        "nsp",
        description="What a sample is: nsp: two segments, half of them of different documents; sop: two "
        "segments side by side, half of them swapped; document: consecutive sentences of one document; "
        "packed: exactly max_length tokens, of as many documents as they hold.",
    )
    max_length: int = Field(128, ge=8, description="Longest sample in tokens, [CLS] and [SEP] included.")
    warmup: list[tuple[int, int]] = Field(
        [],
        description="Shorter samples at first: [[steps, max_length], ...], each for so many steps of "
        "train.global_batch samples.",
    )
    window_blocks: int = Field(
        64, ge=1, description="Blocks of 2**19 tokens, drawn at random, inside which samples are shuffled."
    )
    mask_unit: Literal["token", "word", "span"] = Field(
        "token", description="What is masked as a whole: tokens, words, or spans of words."
    )
    mask_rate: float = Field(0.15, gt=0, lt=1, description="Share of tokens chosen for prediction.")
    mask_token_rate: float = Field(0.8, ge=0, le=1, description="Share of the chosen that become [MASK].")
    random_token_rate: float = Field(
        0.1, ge=0, le=1, description="Share of the chosen that become a random piece; the rest stay."
    )
    span_p: float = Field(0.2, gt=0, le=1, description="Of the geometric distribution of a span's words.")
    span_max: int = Field(10, ge=1, description="Longest span in words.")

    @property
    def has_pairs(self) -> bool:
        """Whether samples are two segments with a label."""
        return self.kind in PAIRS

    @model_validator(mode="after")
    def _check(self) -> SamplesConfig:
        if self.mask_token_rate + self.random_token_rate > 1:
            raise ValueError(
                f"mask_token_rate={self.mask_token_rate} and random_token_rate={self.random_token_rate} "
                "add up to more than 1"
            )
        for steps, length in self.warmup:
            if steps < 1 or not 8 <= length <= self.max_length:
                raise ValueError(
                    f"warmup: [{steps}, {length}] is not at least one step of samples of 8 to "
                    f"max_length={self.max_length} tokens"
                )
        return self


class ObjectivesConfig(Section):
    """What the losses of the objectives count for in the sum that is trained."""

    mlm: float = Field(
        1.0, ge=0, description="Weight of masked tokens; 0: nothing is masked, sentence pairs alone."
    )
    pairs: float = Field(
        1.0, ge=0, description="Weight of sentence pairs, where samples.kind, nsp or sop, has them."
    )
    rtd: float = Field(
        50.0, ge=0, description="Weight of replaced tokens, where model.generator_size makes a generator."
    )


class OptimizerConfig(Section):
    """The optimizer and the course of its learning rate."""

    name: Literal["adamw", "stable-adamw", "lamb", "muon"] = Field(
        "adamw", description="Algorithm; muon takes the matrices of the layers, AdamW the rest."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Highest learning rate, reached after warm-up.")
    schedule: Literal["linear", "cosine", "wsd"] = Field(
        "linear", description="Way down: a line, half a cosine, or stable and then 1 - sqrt (wsd)."
    )
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="Share of the schedule spent on warm-up.")
    decay_fraction: float = Field(
        0.2, gt=0, le=1, description="Share of the schedule, at its end, on the way down; wsd alone."
    )
    final_fraction: float = Field(
        0.0, ge=0, lt=1, description="Learning rate at the end of the schedule, as a share of the highest."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.98, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(1e-6, gt=0, description="Added to the denominator.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Decay of muon's first moment; muon alone.")
    weight_norm_bounds: tuple[float, float] | None = Field(
        None, description="The weight's norm in the trust ratio stays between these; lamb alone."
    )
    weight_decay: float = Field(0.01, ge=0, description="Decoupled; not on biases and LayerNorms.")
    gradient_clipping: float = Field(1.0, gt=0, description="Largest norm of the whole gradient.")

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        for key, home, present in (
            ("momentum", "name: muon", self.name == "muon"),
            ("weight_norm_bounds", "name: lamb", self.name == "lamb"),
            ("decay_fraction", "schedule: wsd", self.schedule == "wsd"),
        ):
            value = getattr(self, key)
            if not present and value != type(self).model_fields[key].default:
                raise ValueError(f"{key}={value!r} is for {home} alone")
        if self.weight_norm_bounds and not 0 <= self.weight_norm_bounds[0] < self.weight_norm_bounds[1]:
            raise ValueError(f"weight_norm_bounds={self.weight_norm_bounds}: the first is to be the smaller")
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} "
                "add up to more than 1"
            )
        return self


class TrainConfig(Section):
    """Length and rhythm of a run. Its budget is one of `steps`, `tokens` and `hours`."""

    steps: int | None = Field(None, ge=1, description="Budget in optimizer steps.")
    tokens: float | None = Field(None, ge=1, description="Budget in tokens, special ones included.")
    hours: float | None = Field(
        None, gt=0, description="Budget in hours of training; gives up bitwise repeatability."
    )
    schedule_steps: int | None = Field(
        None, ge=1, description="Steps until the learning rate is at its end; by itself `steps`."
    )
    global_batch: int = Field(256, ge=1, description="Samples in one optimizer step, over all ranks.")
    batch_warmup: list[tuple[float, int]] = Field(
        [],
        description="Pairs [tokens, samples]: until so many tokens are done, steps of so many samples.",
    )
    micro_batch: int = Field(32, ge=1, description="Samples in one forward pass of one rank.")
    micro_tokens: int | None = Field(
        None, ge=8, description="Tokens in one forward pass of one rank at most, instead of micro_batch."
    )
    seed: int = Field(0, ge=0, description="Seed of initial weights, order, masks and dropout.")
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="auto: bfloat16 where the device multiplies it natively, else float32."
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="Recomputes in the backward pass, to save memory: selective, attention; full, layers.",
    )
    compile: Literal["auto", True, False] = Field(
        "auto",
        description="Compiles each layer with torch.compile; auto: on GPUs, where nothing stands in the way.",
    )
    log_every: int = Field(10, ge=1, description="Steps between two log points.")
    eval_every: int = Field(500, ge=1, description="Steps between two held-out losses (and at the end).")
    eval_samples: int = Field(1024, ge=1, description="Samples of a held-out loss.")
    save_every: int = Field(500, ge=1, description="Steps between two checkpoints (and at the end).")
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints that are kept.")

    @property
    def micro_samples(self) -> int | None:
        """Samples of a micro-batch; None where a budget of tokens decides."""
        return None if self.micro_tokens else self.micro_batch

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        budgets = {key: getattr(self, key) for key in ("steps", "tokens", "hours")}
        given = [f"{key}={value}" for key, value in budgets.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of steps, tokens and hours is the budget, not {' and '.join(given) or 'none'}; "
                "null takes one away"
            )
        if self.schedule_steps is not None and self.steps is None:
            raise ValueError(f"schedule_steps={self.schedule_steps} goes with a budget in steps alone")
        if self.schedule_steps is not None and self.steps and self.schedule_steps < self.steps:
            raise ValueError(f"schedule_steps={self.schedule_steps} is less than steps={self.steps}")
        until = 0.0
        for tokens, samples in self.batch_warmup:
            if tokens <= until:
                raise ValueError(f"batch_warmup={self.batch_warmup}: tokens must go up from stage to stage")
            if samples < 1:
                raise ValueError(f"batch_warmup={self.batch_warmup}: {samples} samples are no batch")
            until = tokens
        return self


class ParallelConfig(Section):
    """How a job is spread over ranks."""

    tensor: int = Field(1, ge=1, description="Ranks that share each layer (tensor parallel).")
    sequence: bool = Field(
        False, description="Those ranks share out the tokens as well, between layers: less memory."
    )
    zero_stage: int = Field(
        1, ge=0, le=3, description="DeepSpeed ZeRO: 1 shards optimizer states, 2 gradients, 3 weights."
    )
    ranks: int = Field(
        0, ge=0, description="Local processes; 0: one for each GPU, on a CPU one for each tensor rank."
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "sequence=true shares out tokens among tensor-parallel ranks, and tensor=1 has none"
            )
        return self


class LaunchConfig(Section):
    """What is done about ranks that fail or stand still."""

    start_seconds: float = Field(
        1800, gt=0, description="Ranks that make no first step within so many seconds count as hung."
    )
    hang_seconds: float = Field(
        600, gt=0, description="Ranks that make no step for so many seconds count as hung."
    )
    restarts: int = Field(20, ge=0, description="All ranks are started anew at most so often in one job.")
    restarts_without_progress: int | None = Field(
        None,
        ge=0,
        description="Likewise in a row without a new checkpoint; by itself 2 in a Slurm job, else 0.",
    )


class PretrainConfig(Section):
    """Token shards -> checkpoints."""

    run: str = Field(description="Folder for checkpoints, TensorBoard events and logs.")
    data: str | list[Corpus] = Field(
        description="Output folder of `bertscale prep`, or several mixed: [{path: A, weight: 0.7}, ...]."
    )
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(), description="The encoder.")
    samples: SamplesConfig = Field(default_factory=lambda: SamplesConfig(), description="The samples.")
    objectives: ObjectivesConfig = Field(
        default_factory=lambda: ObjectivesConfig(), description="What is learnt of them."
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(), description="The optimizer and its learning rate."
    )
    train: TrainConfig = Field(description="Length and rhythm of the run.")
    parallel: ParallelConfig = Field(default_factory=lambda: ParallelConfig(), description="The ranks.")
    launch: LaunchConfig = Field(default_factory=lambda: LaunchConfig(), description="Failing ranks.")

    @property
    def corpora(self) -> list[Corpus]:
        """The data sets, one or several."""
        return [Corpus(path=self.data, weight=1.0)] if isinstance(self.data, str) else self.data

    @property
    def trained(self) -> tuple[str | None, str | None, str | None]:
        """Names of the objectives that are trained, None for one that is not: masked tokens, pairs, replaced
        tokens."""
        objectives, samples = self.objectives, self.samples
        return (
            "mlm" if objectives.mlm else None,
            samples.kind if objectives.pairs and samples.has_pairs else None,
            "rtd" if objectives.rtd and self.model.generator_size is not None else None,
        )

    @property
    def compile_obstacle(self) -> str | None:
        """The key, with its value and a reason, that layers cannot be compiled with; None: they can."""
        recompute = self.train.activation_checkpointing
        if self.parallel.tensor > 1:
            return f"parallel.tensor={self.parallel.tensor} (ranks talk to each other inside the layers)"
        if self.parallel.zero_stage == 3:
            return "parallel.zero_stage=3 (DeepSpeed gathers the weights by hooks inside the layers)"
        if recompute != "none":
            return f"train.activation_checkpointing={recompute} (dropout would not be drawn the same again)"
        return None

    @field_validator("data", mode="before")
    @classmethod
    def _check_data(cls, data: Any) -> Any:
        if isinstance(data, str):
            return data
        if not isinstance(data, list) or not data:
            raise ValueError(f"{data} is neither a folder nor a list of folders with their weights")
        # Checked here, so that a wrong key is told once, and not for each of the two types.
        corpora = []
        for number, one in enumerate(data):
            values = {"path": one} if isinstance(one, str) else one
            where = f"number {number + 1}"
            corpora.append(one if isinstance(one, Corpus) else check_config(Corpus, values, where))
        paths = [corpus.path for corpus in corpora]
        if len(set(paths)) < len(paths):
            raise ValueError(f"{', '.join(paths)} names a data set twice; give it one weight")
        return corpora

    @model_validator(mode="after")
    def _check(self) -> PretrainConfig:
        if self.samples.has_pairs and not self.model.sentence_head:
            raise ValueError(
                f"samples.kind={self.samples.kind} makes sentence pairs, and "
                f"model.preset={self.model.preset} has no head for them: take "
                "samples.kind=packed or document, or model.sentence_head=true"
            )
        if self.train.compile is True and self.compile_obstacle:
            raise ValueError(
                f"train.compile=true does not go with {self.compile_obstacle}; take auto or false"
            )
        if self.samples.max_length > self.model.max_position_embeddings:
            raise ValueError(
                f"samples.max_length={self.samples.max_length} is longer than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )
        self._check_objectives()
        shapes = [("model.", self.model), ("the generator's ", self.model.generator or self.model)]
        for owner, shape in shapes:
            for name in ("num_attention_heads", "intermediate_size"):
                size = getattr(shape, name)
                if size % self.parallel.tensor:
                    fit = [
                        n
                        for n in range(1, self.model.num_attention_heads + 1)
                        if all(s.num_attention_heads % n == s.intermediate_size % n == 0 for _, s in shapes)
                    ]
                    raise ValueError(
                        f"parallel.tensor={self.parallel.tensor} does not divide {owner}{name}={size}; "
                        f"sizes that do: {', '.join(map(str, fit))}"
                    )
        if self.train.micro_tokens is not None and self.train.micro_tokens < self.samples.max_length:
            raise ValueError(
                f"train.micro_tokens={self.train.micro_tokens} is less than one sample of "
                f"samples.max_length={self.samples.max_length}"
            )
        for key, size in [
            *(("a batch of train.batch_warmup", samples) for _, samples in self.train.batch_warmup),
            ("train.global_batch", self.train.global_batch),
        ]:
            if self.samples.has_pairs and size % 2:
                raise ValueError(f"{key}={size} is odd: half of a batch are other pairs")
        return self

    def _check_objectives(self) -> None:
        objectives, share = self.objectives, self.model.generator_size
        for key, reason in (
            ("mlm", "masked tokens are all that the generator learns from"),
            ("rtd", "the generator is there for replaced tokens alone"),
        ):
            if share is not None and not getattr(objectives, key):
                raise ValueError(
                    f"objectives.{key}=0 and model.generator_size={share}: {reason}; give it a weight, or "
                    "take the generator away with model.generator_size=null"
                )
        if not any(self.trained):
            raise ValueError(
                f"nothing is learnt: objectives.mlm={objectives.mlm:g}, objectives.pairs="
                f"{objectives.pairs:g} with samples.kind={self.samples.kind}, and no generator "
                "(model.generator_size) for replaced tokens; give one of them a weight"
            )


# ------------------------------------------------------------------------------------------ finetune


class FinetuneConfig(Section):
    """An encoder and labelled text -> a classifier."""

    encoder: str = Field(description="Checkpoint folder, run folder or Hugging Face folder.")
    train: str = Field(description="Training examples, jsonl with a text and a label field.")
    test: str = Field(description="Held-out examples, same form.")
    output: str = Field(description="Folder for the classifier, its metrics and predictions.")
    text_field: str = Field("text", description="Name of the text field.")
    label_field: str = Field("label", description="Name of the label field.")
    max_length: int = Field(128, ge=8, description="Longest example in tokens; longer ones are cut.")
    epochs: int = Field(10, ge=1, description="Passes over the training examples.")
    batch: int = Field(32, ge=1, description="Examples in one step.")
    learning_rate: float = Field(1e-4, gt=0, description="Highest learning rate.")
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="Share of the steps spent on warm-up.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled; not on biases and LayerNorms.")
    pooling: Literal["first", "mean"] = Field(
        "first", description="A sample's vector: the pooled first token, as BERT, or the mean of all tokens."
    )
    freeze_encoder: bool = Field(
        False, description="Trains the classifier alone, on the encoder's features as they are."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout of hidden states while fine-tuning.")
    seeds: list[int] = Field([0], min_length=1, description="One run for each; mean and spread are reported.")
    compare_random: bool = Field(
        False, description="Also trains the same encoder from random weights, side by side."
    )
    random_learning_rate: float | None = Field(
        None, gt=0, description="Highest learning rate from random weights; without it the same."
    )

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{seeds} names a seed twice, which would feign a small spread")
        return seeds


# ------------------------------------------------------------------------------------------- cluster


class ClusterConfig(Section):
    """The facts of one site's Slurm cluster, or of one partition of it."""

    partition: str | None = Field(None, description="Partition; without it the cluster's default.")
    account: str | None = Field(None, description="Account that is charged.")
    qos: str | None = Field(None, description="Quality of service.")
    constraint: str | None = Field(None, description="Node features, such as a GPU's name.")
    sbatch: list[str] = Field([], description="Further sbatch options, each as --name=value.")
    srun: list[str] = Field([], description="Further srun options, such as those of a container plug-in.")
    gpus_per_node: int = Field(0, ge=0, description="GPUs of a node; one rank runs on each of them.")
    tasks_per_node: int = Field(1, ge=1, description="Ranks of a node that has no GPU.")
    cpus_per_task: int = Field(1, ge=1, description="Cores of one rank.")
    memory_per_node: str | None = Field(None, description="As sbatch --mem reads it; 0 is all of a node's.")
    gpu_memory_gb: float | None = Field(None, gt=0, description="Memory of one GPU in GB (1e9 bytes).")
    time: str | None = Field(None, description="Time limit where none is given, such as 1-00:00:00.")
    signal_seconds: int = Field(
        300, ge=1, description="A job is told to save so many seconds before its time limit."
    )
    setup: list[str] = Field([], description="Shell lines of the batch script, such as `module load cuda`.")
    environment: dict[str, str] = Field(
        default_factory=dict, description="Variables of the job, such as NCCL_SOCKET_IFNAME."
    )
    container: list[str] = Field(
        [], description="Words before each rank's command, such as [apptainer, exec, --nv, bertscale.sif]."
    )
    python: str | None = Field(
        None, description="Python of the ranks, inside the container if any; without it this one."
    )
    batch_python: str | None = Field(
        None, description="Python (3.11 or later, nothing installed) of the batch host; without it `python`."
    )
    log_root: str | None = Field(None, description="Folder for logs; without it they lie with the job.")
    node_check: bool = Field(True, description="Each node is checked before ranks start on it.")
    check_seconds: float = Field(120, gt=0, description="A node that has not answered by then is left out.")
    min_free_memory_gb: float = Field(1, ge=0, description="A node with less free memory is left out.")
    min_free_disk_gb: float = Field(1, ge=0, description="Likewise, free space of its temporary folder.")
    min_bandwidth_mb: float = Field(
        0, ge=0, description="A node that exchanges fewer MB/s with its neighbours is left out."
    )
    bad_nodes: str | None = Field(
        None, description="File of nodes to avoid, shared by all jobs; failed checks add to it."
    )
    bad_node_hours: float = Field(24, gt=0, description="A node leaves that file after so many hours.")

    @field_validator("time", "memory_per_node", mode="before")
    @classmethod
    def _check_quotes(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML reads 24:00:00 as a number to the base of 60
            raise ValueError(f"{value} is a number; put the value in quotes, as Slurm is to read it")
        return value

    @field_validator("environment")
    @classmethod
    def _check_names(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not name.isidentifier():
                raise ValueError(f"{name!r} is no name of a variable")
        return environment

    @field_validator("sbatch", "srun")
    @classmethod
    def _check_options(cls, options: list[str]) -> list[str]:
        for option in options:
            if not option.startswith("--") or any(character.isspace() for character in option):
                raise ValueError(f"{option!r} is not an option of the form --name=value")
        return options


class PipelineStage(Section):
    """One link of a pipeline: exactly one of prep, pretrain, convert and finetune."""

    prep: str | None = Field(None, description="Config of a data preparation.")
    pretrain: str | None = Field(None, description="Config of a pretraining.")
    convert: list[str] | None = Field(
        None, min_length=2, max_length=2, description="Conversion: [SOURCE, OUTPUT]."
    )
    finetune: str | None = Field(None, description="Config of a fine-tuning.")
    set: list[str] = Field([], description="Overrides of the stage's config, each as key=value.")
    cluster: str | None = Field(None, description="Cluster file of this link; without it the pipeline's.")
    nodes: int = Field(1, ge=1, description="Nodes.")
    array: int = Field(0, ge=0, description="Tasks of a prep array; 0: one job.")
    spares: int = Field(0, ge=0, description="Further nodes that stand by.")
    time: str | None = Field(None, description="Time limit of this link, in quotes.")

    @property
    def stage(self) -> str:
        """Which of the four it is."""
        return next(name for name in ("prep", "pretrain", "convert", "finetune") if getattr(self, name))

    @model_validator(mode="after")
    def _check(self) -> PipelineStage:
        given = [name for name in ("prep", "pretrain", "convert", "finetune") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"a stage names one of prep, pretrain, convert, finetune, not {given or 'none'}")
        return self


class PipelineConfig(Section):
    """Stages that are submitted together and run one after another."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="Name of the chain.")
    cluster: str = Field(description="Cluster file.")
    stages: list[PipelineStage] = Field(min_length=1, description="The links, in their order.")


# ------------------------------------------------------------------------------------------- loading

Config = TypeVar("Config", bound=Section)


def load_config(section: type[Config], path: str | Path, overrides: list[str]) -> Config:
    """Reads YAML at `path`, applies `key=value` overrides and checks the whole.

    A value is read as YAML (`train.steps=100`, `input=[a.txt, b.txt]`). Raises UserError that
    names each wrong key and value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {_reason(error)}") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"the config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"the config {path} is not a mapping of keys to values")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r} is not of the form key=value, such as train.steps=100")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{override!r}: the value is not YAML") from error
        _set(values, key, value)
    return check_config(section, values, str(path))


def check_config(section: type[Config], values: dict[str, Any], origin: str) -> Config:
    """`values` as a checked `section`; raises UserError, one line for each wrong key."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        lines = [_explain(section, problem) for problem in error.errors()]
        raise UserError("\n".join(f"{origin}: {line}" for line in lines)) from error


def describe_fields(section: type[Section], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key with its default, sentence) of every field, for the help texts."""
    rows = []
    for name, field in section.model_fields.items():
        inner = _inner_section(field.annotation)
        if inner is not None:
            rows += describe_fields(inner, f"{prefix}{name}.")
        else:
            value = field.get_default(call_default_factory=True)
            default = "required" if field.is_required() else f"default {value}"
            rows.append((f"{prefix}{name}", f"{field.description} ({default})"))
    return rows


def _inner_section(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"{dotted}={value}: {parent} is a value, not a section")
        values = inner
    values[last] = value


def _explain(section: type[Section], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        here: type[Section] | None = section
        for part in location[:-1]:
            field = here.model_fields.get(part) if here else None
            here = _inner_section(field.annotation) if field else None
        names = list(here.model_fields) if here else []
        near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
        everywhere = [name for name, _ in describe_fields(section)]
        deep = [name for name in everywhere if name.split(".")[-1] == location[-1]]
        if deep:
            return f"unknown key {key}; did you mean {deep[0]}?"
        if near:
            return f"unknown key {key}; did you mean {'.'.join([*location[:-1], near[0]])}?"
        return f"unknown key {key}; the keys here are {', '.join(names)}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message if not key else f"{key}: {message}"
    return f"{key}={problem['input']!r}: {message[0].lower()}{message[1:]}"


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"
