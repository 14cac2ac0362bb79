"""Sections of a pretraining config: data, samples, objectives, optimizer, length of the run, and ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from bertscale.config.device import DEVICE, Device
from bertscale.config.init import InitConfig
from bertscale.config.model import PRESET_DEFAULTS, ModelConfig
from bertscale.config.phases import phase_names, values_of_phase
from bertscale.config.section import Section, check_config, override_values, read_values
from bertscale.errors import UserError


class Corpus(Section):
    """One of several data sets that are mixed."""

    path: str = Field(description="Output folder of `bertscale prep`.")
    weight: float = Field(1.0, gt=0, description="Share of the samples, relative to the other weights.")
    max_epochs: float | None = Field(
        None,
        gt=0,
        description="Most epochs of the corpus in the run; where its weight would give more, it is cut.",
    )


PAIRS = ("nsp", "sop")  # kinds of samples of two segments; the sentence head classifies the pair


class SamplesConfig(Section):
    """How training samples are made of documents."""

    kind: Literal["nsp", "sop", "document", "packed"] = Field(
        "nsp",
        description="What a sample is. nsp: two segments, half of the time from different documents. sop: "
        "two consecutive segments, half of the time swapped. document: consecutive sentences of one "
        "document. packed: exactly max_length tokens, from as many documents as needed.",
    )
    max_length: int = Field(128, ge=8, description="Longest sample in tokens, [CLS] and [SEP] included.")
    warmup: list[tuple[int, int]] = Field(
        [],
        description="Shorter samples at first: pairs [steps, max_length], each for that number of steps of "
        "train.global_batch samples.",
    )
    size_exponent: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Weight of a corpus by its size: its tokens to the power of size_exponent, times its "
        "weight. 1: in proportion to the sizes; 0: as if all had the same size.",
    )
    min_document_tokens: int = Field(
        1, ge=1, description="Fewest tokens of a document; shorter documents make no samples."
    )
    window_blocks: int = Field(
        64, ge=1, description="Number of random blocks of 2**19 tokens among which samples are shuffled."
    )
    mask_unit: Literal["token", "word", "span"] = Field(
        "token", description="Unit that is masked as a whole: a token, a word, or a span of words."
    )
    mask_rate: float = Field(0.15, gt=0, lt=1, description="Share of tokens chosen for prediction.")
    mask_token_rate: float = Field(0.8, ge=0, le=1, description="Share of those that become [MASK].")
    random_token_rate: float = Field(
        0.1, ge=0, le=1, description="Share of those that become a random piece; the rest stay."
    )
    span_p: float = Field(
        0.2, gt=0, le=1, description="Parameter p of the geometric distribution of span lengths."
    )
    span_max: int = Field(10, ge=1, description="Longest span in words.")

    @property
    def has_pairs(self) -> bool:
        """Tells whether samples are two segments with a label."""
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
                    f"warmup: [{steps}, {length}] must be 1 or more steps of samples of 8 to "
                    f"max_length={self.max_length} tokens"
                )
        return self


class ObjectivesConfig(Section):
    """Weights of the objectives in the loss, which is their weighted sum."""

    mlm: float = Field(
        1.0, ge=0, description="Weight of masked tokens; 0 masks nothing, to train on sentence pairs only."
    )
    pairs: float = Field(1.0, ge=0, description="Weight of sentence pairs, if samples.kind is nsp or sop.")
    rtd: float = Field(
        50.0, ge=0, description="Weight of replaced-token detection, if there is model.generator_size."
    )
    clm: float = Field(
        0.0,
        ge=0,
        description="Weight of causal language modelling, in place of all others: each token sees those "
        "before it and predicts the next one; mlm is then 0 by default.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("clm"):
            return {"mlm": 0.0, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> ObjectivesConfig:
        if self.clm and self.mlm:
            raise ValueError(
                f"clm={self.clm:g} and mlm={self.mlm:g}: a token is predicted from those before it or from "
                "both sides; set one of the two to 0"
            )
        return self


class OptimizerConfig(Section):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "stable-adamw", "lamb", "muon"] = Field(
        "adamw", description="Algorithm; muon updates the layers' matrices, AdamW the other weights."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Highest learning rate, reached after warm-up.")
    schedule: Literal["linear", "cosine", "wsd"] = Field(
        "linear", description="Decay of the learning rate: linear, cosine, or wsd (stable, then 1 - sqrt)."
    )
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="Share of the schedule spent on warm-up.")
    decay_fraction: float = Field(
        0.2, gt=0, le=1, description="Share of the schedule, at its end, spent on the decay; only for wsd."
    )
    final_fraction: float = Field(
        0.0, ge=0, lt=1, description="Learning rate at the end of the schedule, as a share of the highest."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.98, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(1e-6, gt=0, description="Added to the denominator of the update.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Decay of the first moment in muon; only for muon.")
    weight_norm_bounds: tuple[float, float] | None = Field(
        None, description="Bounds [low, high] of the weight norm in the trust ratio; only for lamb."
    )
    weight_decay: float = Field(0.01, ge=0, description="Weight decay, decoupled; not on biases and norms.")
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
                raise ValueError(f"{key}={value!r} is only for {home}; leave it out")
        if self.weight_norm_bounds and not 0 <= self.weight_norm_bounds[0] < self.weight_norm_bounds[1]:
            raise ValueError(f"weight_norm_bounds={self.weight_norm_bounds}: the first must be smaller")
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} "
                "add up to more than 1"
            )
        return self


class TrainConfig(Section):
    """Length and batches of a run. Its budget is exactly one of `steps`, `tokens` and `hours`."""

    steps: int | None = Field(None, ge=1, description="Budget in training steps.")
    tokens: float | None = Field(None, ge=1, description="Budget in tokens, special tokens included.")
    hours: float | None = Field(
        None, gt=0, description="Budget in hours of training; such a run is not repeatable bit for bit."
    )
    schedule_steps: int | None = Field(
        None, ge=1, description="Steps of the whole learning-rate schedule; by default `steps`."
    )
    global_batch: int = Field(256, ge=1, description="Samples in one training step, over all ranks.")
    batch_warmup: list[tuple[float, int]] = Field(
        [],
        description="Smaller batches at first: pairs [tokens, samples], that number of samples in each step "
        "until that number of tokens is reached.",
    )
    micro_batch: int = Field(32, ge=1, description="Number of samples in one forward pass of one rank.")
    micro_tokens: int | None = Field(
        None, ge=8, description="Most tokens in one forward pass of one rank, in place of micro_batch."
    )
    seed: int = Field(0, ge=0, description="Seed of initial weights, order, masks and dropout.")
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Precision; auto: bfloat16 where the device has it natively, else float32."
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="Recompute activations in the backward pass, to save memory: of attention (selective) or "
        "of whole layers (full).",
    )
    compile: Literal["auto", "graphs", True, False] = Field(
        "auto",
        description="Compile each layer with torch.compile. auto: on GPUs, unless another setting prevents "
        "it. graphs: also replay each layer as CUDA graphs.",
    )
    static_targets: Literal["auto", True, False] = Field(
        "auto",
        description="Pad the predicted positions of a micro-batch to a fixed number, with no effect on the "
        "loss; auto: on GPUs, if the number of tokens is fixed too.",
    )
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of a moving average of the weights, kept beside them, such as 0.999; 0: none.",
    )
    log_every: int = Field(10, ge=1, description="Steps between two log points.")
    eval_every: int = Field(500, ge=1, description="Steps between two held-out losses (and at the end).")
    eval_samples: int = Field(1024, ge=1, description="Number of samples of a held-out loss.")
    pseudo_perplexity: int = Field(
        0,
        ge=0,
        description="Samples of each held-out set for its pseudo-perplexity: each of their tokens is masked "
        "alone, a pass for each token. 0: none.",
    )
    fills: list[str] = Field(
        [],
        description="Sentences with [MASK], which the model fills at each held-out loss, to look at: "
        '["Paris is the [MASK] of France."].',
    )
    tasks: list[str] = Field(
        [],
        description="Configs of small fine-tunings, whose figure of dev is followed: each begins from a "
        "checkpoint just saved, as a process of low priority beside the training.",
    )
    tasks_every: int | None = Field(
        None, ge=1, description="Steps between two rounds of tasks (and at the end); by default save_every."
    )
    save_every: int = Field(500, ge=1, description="Steps between two checkpoints (and at the end).")
    keep_checkpoints: int = Field(2, ge=1, description="Number of newest checkpoints that are kept.")
    keep_every: int | None = Field(
        None, ge=1, description="Also keep, for good, the checkpoint of each step that is a multiple of this."
    )

    @property
    def micro_samples(self) -> int | None:
        """Counts the samples of a micro-batch; None where `micro_tokens` limits its tokens instead."""
        return None if self.micro_tokens else self.micro_batch

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        budgets = {key: getattr(self, key) for key in ("steps", "tokens", "hours")}
        given = [f"{key}={value}" for key, value in budgets.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of steps, tokens and hours is the budget, not {' and '.join(given) or 'none'}; "
                "set the others to null"
            )
        if self.schedule_steps is not None and self.steps is None:
            raise ValueError(f"schedule_steps={self.schedule_steps} needs a budget in steps (train.steps)")
        if self.schedule_steps is not None and self.steps and self.schedule_steps < self.steps:
            raise ValueError(f"schedule_steps={self.schedule_steps} is less than steps={self.steps}")
        for text in self.fills:
            if "[MASK]" not in text:
                raise ValueError(
                    f"fills: {text!r} has no [MASK]; put one where the model is to fill a piece in"
                )
        for key in ("keep_every", "tasks_every"):
            every = getattr(self, key)
            if every is not None and every % self.save_every:
                raise ValueError(
                    f"{key}={every} is no multiple of save_every={self.save_every}: other steps have no "
                    "checkpoint"
                )
        names = [Path(task).stem for task in self.tasks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"tasks: two files are called {twice}, the name of the curve; rename one")
        until = 0.0
        for tokens, samples in self.batch_warmup:
            if tokens <= until:
                raise ValueError(f"batch_warmup={self.batch_warmup}: tokens must grow from pair to pair")
            if samples < 1:
                raise ValueError(f"batch_warmup={self.batch_warmup}: a batch of {samples} samples is empty")
            until = tokens
        return self


class ParallelConfig(Section):
    """How a run is distributed over ranks."""

    tensor: int = Field(1, ge=1, description="Tensor-parallel size: ranks that share each layer.")
    sequence: bool = Field(
        False, description="Sequence parallel: these ranks also shard tokens between layers, saving memory."
    )
    zero_stage: int = Field(
        1, ge=0, le=3, description="ZeRO stage; 1 shards optimizer states, 2 also gradients, 3 also weights."
    )
    ranks: int = Field(
        0, ge=0, description="Number of local ranks; 0: one for each GPU, on a CPU the tensor-parallel size."
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence=true shards tokens over tensor-parallel ranks, and tensor=1 has none")
        return self


class LaunchConfig(Section):
    """What is done about ranks that fail or hang."""

    start_seconds: float = Field(
        1800, gt=0, description="Seconds for the first training step; ranks that take longer count as hung."
    )
    hang_seconds: float = Field(
        600, gt=0, description="Seconds for any later step; ranks that take longer count as hung."
    )
    restarts: int = Field(20, ge=0, description="Restarts of all ranks in one job, at most.")
    restarts_without_progress: int | None = Field(
        None,
        ge=0,
        description="Restarts in a row without a new checkpoint, at most; by default 2 under Slurm, else 0.",
    )

    def restarts_in_a_row(self, *, slurm: bool) -> int:
        """Returns how often all ranks restart without a new checkpoint between, in a Slurm job or here."""
        if self.restarts_without_progress is not None:
            return self.restarts_without_progress
        return 2 if slurm else 0


def compile_obstacle(recompute: str, parallel: ParallelConfig) -> str | None:
    """Names the setting that keeps layers from being compiled, and the reason; None if they can be.

    `recompute`: train.activation_checkpointing.
    """
    if parallel.tensor > 1:
        return f"parallel.tensor={parallel.tensor} (ranks communicate inside the layers)"
    if parallel.zero_stage == 3:
        return "parallel.zero_stage=3 (DeepSpeed gathers the weights by hooks inside the layers)"
    if recompute != "none":
        return f"train.activation_checkpointing={recompute} (the recomputed dropout would differ)"
    return None


def is_compiled(wanted: bool | str, obstacle: str | None, device: str) -> bool:
    """Tells whether `train.compile` compiles layers on a `cuda` or `cpu` device."""
    if wanted == "auto":
        return device == "cuda" and obstacle is None
    return wanted is not False


def check_tensor_degree(degree: int, shapes: Sequence[tuple[str, ModelConfig]]) -> None:
    """Raises ValueError where `degree` ranks cannot share layers of the `shapes`, (owner, shape) each."""
    for owner, shape in shapes:
        for name in ("num_attention_heads", "intermediate_size"):
            size = getattr(shape, name)
            if size % degree:
                fit = [
                    n
                    for n in range(1, shapes[0][1].num_attention_heads + 1)
                    if all(s.num_attention_heads % n == s.intermediate_size % n == 0 for _, s in shapes)
                ]
                raise ValueError(
                    f"parallel.tensor={degree} does not divide {owner}{name}={size}; "
                    f"sizes that do: {', '.join(map(str, fit))}"
                )


class PretrainConfig(Section):
    """Settings of a pretraining: token shards -> checkpoints."""

    phases: dict[str, Any] | None = Field(
        None,
        exclude=True,
        description="Runs one after another, each started from the one before: a mapping of a name to what "
        "that phase changes, its train.steps, tokens or hours above all. The run of a phase is RUN/NAME.",
    )
    phase: str | None = Field(
        None, exclude=True, description="The phase that is meant, where a command takes one alone."
    )
    run: str = Field(description="Folder for checkpoints, TensorBoard events and logs.")
    data: str | list[Corpus] = Field(
        description="Output folder of `bertscale prep`, or several to mix: [{path: A, weight: 0.7}, ...]."
    )
    heldout: dict[str, str] = Field(
        {},
        description="More held-out losses: a name and an output folder of `bertscale prep` each, whose "
        "validation documents are masked at 15 % whatever the run masks; with objectives.clm none is masked.",
    )
    device: Device = Field("auto", description=DEVICE)
    init: InitConfig | None = Field(
        None, description="What the run starts from; init=FOLDER is short for init.from=FOLDER."
    )
    model: ModelConfig = Field(
        ModelConfig(), description="The encoder; with `init`, keys that are not given are the source's."
    )
    samples: SamplesConfig = Field(SamplesConfig(), description="The samples.")
    objectives: ObjectivesConfig = Field(ObjectivesConfig(), description="The training objectives.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimizer and its learning rate.")
    train: TrainConfig = Field(description="Length and batches of the run.")
    parallel: ParallelConfig = Field(ParallelConfig(), description="The ranks.")
    launch: LaunchConfig = Field(LaunchConfig(), description="Restarts of failed ranks.")

    @property
    def corpora(self) -> list[Corpus]:
        """Lists the data sets, one or several."""
        return [Corpus(path=self.data, weight=1.0)] if isinstance(self.data, str) else self.data

    @property
    def is_limited(self) -> bool:
        """Tells whether a corpus has a limit of epochs: then its weight depends on the budget."""
        return any(corpus.max_epochs is not None for corpus in self.corpora)

    @property
    def trained(self) -> tuple[str | None, str | None, str | None]:
        """Names the trained objectives: tokens (masked or next ones), pairs, replaced tokens; None for one
        not trained."""
        objectives, samples = self.objectives, self.samples
        return (
            "clm" if objectives.clm else "mlm" if objectives.mlm else None,
            samples.kind if objectives.pairs and samples.has_pairs else None,
            "rtd" if objectives.rtd and self.model.generator_size is not None else None,
        )

    @property
    def compile_obstacle(self) -> str | None:
        """Names the setting that keeps layers from being compiled, and the reason; None if they can be."""
        return compile_obstacle(self.train.activation_checkpointing, self.parallel)

    def compiles(self, device: str) -> bool:
        """Tells whether layers are compiled on a `cuda` or `cpu` device; `auto`: on a GPU, if they can be."""
        return is_compiled(self.train.compile, self.compile_obstacle, device)

    def has_static_targets(self, device: str) -> bool:
        """Tells whether the number of predicted positions is fixed on a `cuda` or `cpu` device.

        `auto`: on a GPU, where the micro-batches of a phase have about the same number of tokens. A CPU gains
        nothing by it, and would compute predictions for nothing.
        """
        if self.train.static_targets == "auto":
            even_batches = self.samples.kind == "packed" or self.train.micro_tokens is not None
            return device == "cuda" and even_batches
        return self.train.static_targets

    @model_validator(mode="before")
    @classmethod
    def _take_phase(cls, values: Any) -> Any:
        if isinstance(values, dict) and (values.get("phases") or values.get("phase")):
            return values_of_phase(values)
        return values

    @field_validator("data", mode="before")
    @classmethod
    def _check_data(cls, data: Any) -> Any:
        if isinstance(data, str):
            return data
        if not isinstance(data, list) or not data:
            raise ValueError(f"{data} is neither a folder nor a list of folders with their weights")
        # Checked here, so that a wrong key is reported once, and not for each of the two types.
        corpora = []
        for number, corpus in enumerate(data, 1):
            values = {"path": corpus} if isinstance(corpus, str) else corpus
            is_checked = isinstance(corpus, Corpus)
            corpora.append(corpus if is_checked else check_config(Corpus, values, f"number {number}"))
        paths = [corpus.path for corpus in corpora]
        if len(set(paths)) < len(paths):
            raise ValueError(f"{', '.join(paths)} names a data set twice; name it once, with one weight")
        return corpora

    @field_validator("heldout")
    @classmethod
    def _check_names(cls, heldout: dict[str, str]) -> dict[str, str]:
        for name in heldout:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"the name {name!r} has other characters than letters, digits, -, _ and .")
        return heldout

    @model_validator(mode="after")
    def _check(self) -> PretrainConfig:
        if self.samples.has_pairs and not self.model.sentence_head:
            raise ValueError(
                f"samples.kind={self.samples.kind} makes sentence pairs, and "
                f"model.preset={self.model.preset} has no head for them; take "
                "samples.kind=packed or document, or model.sentence_head=true"
            )
        if self.train.compile in (True, "graphs") and self.compile_obstacle:
            raise ValueError(
                f"train.compile={str(self.train.compile).lower()} does not go with "
                f"{self.compile_obstacle}; take auto or false"
            )
        if self.samples.max_length > self.model.max_position_embeddings:
            raise ValueError(
                f"samples.max_length={self.samples.max_length} is longer than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}; change one of them"
            )
        if self.is_limited and self.train.hours is not None:
            raise ValueError(
                "data: max_epochs needs a budget in train.steps or train.tokens; with "
                f"train.hours={self.train.hours:g} nobody knows how many samples the run will use"
            )
        for key in ("fills", "pseudo_perplexity"):
            if getattr(self.train, key) and not self.objectives.mlm:
                raise ValueError(
                    f"train.{key} needs masked tokens to be learnt; objectives.mlm is 0"
                    + (", as objectives.clm is not" if self.objectives.clm else "")
                )
        self._check_objectives()
        check_tensor_degree(
            self.parallel.tensor,
            [("model.", self.model), ("the generator's ", self.model.generator or self.model)],
        )
        if self.train.micro_tokens is not None and self.train.micro_tokens < self.samples.max_length:
            raise ValueError(
                f"train.micro_tokens={self.train.micro_tokens} is less than one sample of "
                f"samples.max_length={self.samples.max_length}"
            )
        for key, size in [
            *(("a batch of train.batch_warmup", samples) for _, samples in self.train.batch_warmup),
            ("train.global_batch", self.train.global_batch),
            ("train.pseudo_perplexity", self.train.pseudo_perplexity),
        ]:
            if self.samples.has_pairs and size % 2:
                raise ValueError(f"{key}={size} is odd; sentence pairs need an even number of samples")
        return self

    def _check_objectives(self) -> None:
        objectives, share = self.objectives, self.model.generator_size
        if objectives.clm and self.samples.has_pairs:
            raise ValueError(
                f"objectives.clm={objectives.clm:g} predicts next tokens of running text, and "
                f"samples.kind={self.samples.kind} makes sentence pairs; take samples.kind=packed or document"
            )
        if objectives.clm and share is not None:
            raise ValueError(
                f"objectives.clm={objectives.clm:g} and model.generator_size={share}: a generator learns "
                "from masked tokens; take objectives.clm=0, or remove it with model.generator_size=null"
            )
        for key, reason in (
            ("mlm", "the generator learns from masked tokens only"),
            ("rtd", "the generator only makes replaced tokens"),
        ):
            if share is not None and not getattr(objectives, key):
                raise ValueError(
                    f"objectives.{key}=0 and model.generator_size={share}: {reason}; give it a weight, or "
                    "remove the generator with model.generator_size=null"
                )
        if not any(self.trained):
            raise ValueError(
                f"nothing is trained: objectives.mlm={objectives.mlm:g}, objectives.pairs="
                f"{objectives.pairs:g} with samples.kind={self.samples.kind}, and no generator "
                "(model.generator_size) for replaced tokens; give one objective a weight"
            )


def with_model_of(config: PretrainConfig, model: ModelConfig) -> PretrainConfig:
    """The config with the source's `model` for all keys of it that were not given.

    Raises UserError where the rest of the config does not go with them.
    """
    assert config.init is not None
    source, given = config.init.source, config.model.model_dump(exclude_unset=True)
    implied = PRESET_DEFAULTS.get(given.get("preset", ""), {})
    kept = {key: value for key, value in given.items() if key not in implied or implied[key] != value}
    if kept.get("preset", model.preset) != model.preset:
        raise UserError(f"model.preset={kept['preset']}, but init.from={source} is of preset {model.preset}")
    values = {**config.model_dump(), "model": {**model.model_dump(), **kept}}
    return check_config(PretrainConfig, values, f"init.from={source}")


def load_phases(path: str | Path, overrides: Sequence[str]) -> dict[str, PretrainConfig]:
    """The pretrainings that a config names, checked: one for each phase, by its name; else one, named "".

    Raises UserError with the mistakes of all.
    """
    values, origin = read_values(path)
    override_values(PretrainConfig, values, overrides, origin)
    try:
        names = [] if values.get("phase") else phase_names(values)
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from error
    if not names:
        return {"": check_config(PretrainConfig, values, origin)}
    configs, mistakes = {}, []
    for name in names:
        try:
            configs[name] = check_config(PretrainConfig, {**values, "phase": name}, f"{origin}, phase {name}")
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return configs
