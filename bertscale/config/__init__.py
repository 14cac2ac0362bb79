"""Every section of a config, declared once. YAML and then `key=value` override the defaults; the whole is
checked before anything starts.

config = load_config(PretrainConfig, "configs/pretrain/quickstart.yaml", ["train.steps=100"])
"""

from bertscale.config.cluster import ClusterConfig, PipelineConfig, PipelineStage
from bertscale.config.device import Device
from bertscale.config.examples import EncodingConfig, ExamplesConfig, TaskKind
from bertscale.config.finetune import FinetuneConfig, load_tasks
from bertscale.config.glue import GlueConfig
from bertscale.config.init import InitConfig
from bertscale.config.model import (
    GPU_POSITIONS,
    MODERN_KEYS,
    POSITIONS,
    PRESET_DEFAULTS,
    ModelConfig,
    padded_vocab_size,
)
from bertscale.config.prep import (
    LANGUAGES,
    SCRIPTS,
    WORK_FOLDER,
    CsvConfig,
    PrepConfig,
    TokenizerTraining,
    check_language,
    is_utf8,
    language_code,
)
from bertscale.config.pretrain import (
    PAIRS,
    Corpus,
    LaunchConfig,
    ObjectivesConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    SamplesConfig,
    TrainConfig,
    load_phases,
    with_model_of,
)
from bertscale.config.quality import RULES_OF_WORDS, QualityConfig
from bertscale.config.section import (
    Config,
    Section,
    check_config,
    describe_fields,
    load_config,
    overridden,
)
from bertscale.errors import UserError
