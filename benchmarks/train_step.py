"""One training step on real text of natural lengths: ours, transformers' and megatron-core's BertModel.

    python benchmarks/train_step.py                     # on the quickstart's data, made if it is not there
    python benchmarks/train_step.py --data FOLDER ... --json FILE
    python benchmarks/train_step.py --profile           # and where our step's time goes, BERT-base at 128

Same sizes, same samples with the same masks, same optimizer (AdamW, clipping at 1), same process, in turns:
sentence pairs of at most 128 tokens, and documents of at most 512. Ours is what `bertscale pretrain` runs:
DeepSpeed with float32 master weights, samples laid end to end, the vocabulary on masked positions. Theirs
are plain loops that hold everything in bfloat16, on batches padded to their longest sample. Rates count
real tokens. The measured rounds fill about six minutes on two cores (--minutes).

megatron-core's model is its own BertModel of local layers with its own loss; it is pre-LN. Two places of
it run on CUDA alone, and are replaced: the buffer of attention scores, which is allocated on the current
CUDA device, by the same buffer on the host; and the stream of random numbers of the tensor ranks, which is
CUDA's, by torch's own (there is no dropout here unless --dropout asks for it).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertscale.bench.timed_steps import (
    Step,
    Stopwatch,
    machine,
    our_step,
    padded,
    plain_step,
    profiled,
    top_operators,
    transformers_step,
)
from bertscale.config import PretrainConfig, padded_vocab_size
from bertscale.data.loader import Loader
from bertscale.data.micro_batch import MicroBatch
from bertscale.data.mixture import Mixture
from bertscale.data.shards import Dataset, open_dataset
from bertscale.tokenizer import load_tokenizer
from bertscale.train.device import choose_precision, measured_peak
from bertscale.train.engine import pretraining_engine
from bertscale.train.metrics import Rate
from bertscale.train.parallel import Ranks, start_ranks

VOCAB = 30_522  # BERT's own: a tokenizer of fewer pieces still pays for all of them
SMALL = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
TINY = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
PEERS = ("transformers", "megatron-core")
# name, sizes, kind and length of samples, samples of a step, goals against the peers, share of the time
CASES: list[tuple[str, dict[str, int], str, int, int, tuple[float, float], float]] = [
    ("4x256, pairs 128", SMALL, "nsp", 128, 32, (3.0, 3.0), 0.1),
    ("4x256, documents 512", SMALL, "document", 512, 16, (3.0, 3.0), 0.1),
    ("BERT-base, pairs 128", {}, "nsp", 128, 16, (2.0, 3.0), 0.4),
    ("BERT-base, documents 512", {}, "document", 512, 4, (2.0, 3.0), 0.4),
]
SMOKE = [
    ("tiny, pairs 128", TINY, "nsp", 128, 4, (1.0, 1.0), 0.5),
    ("tiny, documents 512", TINY, "document", 512, 2, (1.0, 1.0), 0.5),
]
SHOWN = 12  # operators of a profile


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", help="Output folders of `bertscale prep`.")
    parser.add_argument("--json", type=Path, help="File for the results.")
    parser.add_argument("--rounds", type=int, default=9, help="Turns of each side at most (%(default)s).")
    parser.add_argument("--minutes", type=float, default=5.5, help="Of all cases together (%(default)s).")
    parser.add_argument("--dropout", type=float, default=0.0, help="Dropout of all models (%(default)s).")
    parser.add_argument("--profile", action="store_true", help="Show where the time of our step goes.")
    parser.add_argument("--smoke", action="store_true", help="Tiny models, to see that it runs.")
    options = parser.parse_args()
    data = [open_dataset(folder) for folder in options.data or [quickstart_data()]]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    device = torch.device("cpu")
    ranks = start_ranks(1, device)
    dtype, reason = choose_precision("auto", device)
    peak = measured_peak(device, dtype)
    facts = {**machine(device, peak), "precision": f"{dtype}".removeprefix("torch.")}
    facts["data"] = [str(dataset.folder) for dataset in data]
    facts["dropout"] = options.dropout
    print(f"{facts['processor']}, {facts['device']}, torch {facts['torch']}, {', '.join(facts['data'])}")
    print(f"{facts['precision']} ({reason}); matrix products run at {peak / 1e9:.0f} GFLOP/s at most")
    print(
        f"{'real tokens/s':<26}{'ours':>9}{'of peak':>9}", *(f"{p:>15}{'ratio':>7}{'goal':>6}" for p in PEERS)
    )
    results = []
    for name, sizes, kind, length, batch, goals, share in SMOKE if options.smoke else CASES:
        config = configure(data, sizes, kind, length, batch, options.dropout)
        seconds = 60 * options.minutes * share
        measured = compare(
            config, data, ranks, dtype, seconds, options.rounds, options.profile and kind == "nsp"
        )
        ours, of_peak = measured["ours"], measured["flops"] / peak
        text = f"{name:<26}{ours:>9,.0f}{of_peak:>9.0%}"
        for peer, goal in zip(PEERS, goals, strict=True):
            theirs, ratio = measured[peer]
            text += f"{theirs:>16,.0f}{ratio:>7.2f}{goal:>6}"
            results.append(
                {
                    "case": f"{name}, against {peer}",
                    "ours": round(ours, 1),
                    "peer": round(theirs, 1),
                    "unit": "tokens/s",
                    "ratio": round(ratio, 3),
                    "goal": goal,
                    "rounds": measured["rounds"],
                    "mean_length": round(measured["length"], 1),
                }
            )
        print(f"{text}   {measured['rounds']} rounds, {measured['length']:.0f} tokens a sample", flush=True)
        results.append(
            {
                "case": f"{name}, of the measured peak",
                "ours": measured["flops"],
                "peer": peak,
                "unit": "FLOP/s",
                "ratio": round(of_peak, 3),
                "goal": 0.35 if name.startswith("BERT-base") else None,
            }
        )
        if measured["profile"] and (name.startswith("BERT-base") or options.smoke):
            show_profile(measured["profile"])
            results[-1]["profile"] = measured["profile"][:SHOWN]
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")
    return 0


def configure(
    data: Sequence[Dataset], sizes: dict[str, int], kind: str, length: int, batch: int, dropout: float
) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "run": "unused",
            "data": [str(dataset.folder) for dataset in data],
            "model": {
                **sizes,
                "sentence_head": kind == "nsp",
                "hidden_dropout_prob": dropout,
                "attention_probs_dropout_prob": dropout,
            },
            "samples": {"kind": kind, "max_length": length},
            "train": {"steps": 1000, "global_batch": batch, "micro_batch": batch},
            "parallel": {"zero_stage": 0},  # one rank has nobody to share states with
        }
    )


def compare(
    config: PretrainConfig,
    data: Sequence[Dataset],
    ranks: Ranks,
    dtype: torch.dtype,
    seconds: float,
    rounds: int,
    profile: bool,
) -> dict[str, Any]:
    """Measures all sides in turns, for about `seconds`: one step each on one batch is a round.

    It takes at least two rounds, after a warm-up on a quarter of a batch.
    """
    tokenizer = load_tokenizer(data[0].tokenizer_path)
    vocab_size = max(VOCAB, tokenizer.vocab_size)
    batch = config.train.global_batch
    mixture = Mixture(data, [1.0] * len(data), config.samples, global_batch=batch, seed=0)
    loader = Loader(mixture, tokenizer, micro_batch=batch, rank=0, world=1)
    small = Loader(mixture, tokenizer, micro_batch=max(2, batch // 4), rank=0, world=1)

    engine = pretraining_engine(config, vocab_size, ranks, dtype)
    engine.start(0)
    watch = Stopwatch(ranks.device)
    sides: dict[str, Step] = {
        "ours": our_step(engine, watch),
        "transformers": transformers_step(config, vocab_size, ranks.device, dtype, watch),
        "megatron-core": megatron_step(config, vocab_size, ranks.device, dtype, watch),
    }
    rate = Rate(config.model, vocab_size, peak=1.0)
    by_side: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    samples = tokens = 0
    began = time.perf_counter()
    for number in range(-1, rounds):
        micro_batch = small.step(0)[0] if number < 0 else loader.step(number)[0]
        inputs = padded(micro_batch, micro_batch.lengths)
        for side, step in sides.items():
            rate.restart()
            loss = step([micro_batch] if side == "ours" else [inputs])
            assert 0 < float(loss) < 20, f"{side}: {loss}"
            rate.add(micro_batch.lengths, micro_batch.num_targets)
            figures = rate.close(ranks)
            if number >= 0:
                by_side[side].append(figures)
        if number < 0:
            began = time.perf_counter()
            continue
        samples, tokens = samples + batch, tokens + len(micro_batch.tokens)
        elapsed = time.perf_counter() - began
        if number >= 1 and elapsed + elapsed / (number + 1) > seconds:
            break
    rates = {
        side: [figures["speed/tokens_per_second"] for figures in rounds_of]
        for side, rounds_of in by_side.items()
    }
    result: dict[str, Any] = {
        "ours": statistics.median(rates["ours"]),
        "flops": statistics.median(figures["speed/mfu"] for figures in by_side["ours"]),
        "rounds": len(rates["ours"]),
        "length": tokens / samples,
        "profile": profile_of(sides["ours"], micro_batch, ranks) if profile else None,
    }
    for peer in PEERS:
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates[peer], strict=True))
        result[peer] = statistics.median(rates[peer]), ratio
    return result


def profile_of(step: Step, batch: MicroBatch, ranks: Ranks) -> list[tuple[str, float]]:
    """Lists (operator, its own share of the step), the largest first."""
    operators = top_operators(profiled(lambda: step([batch]), ranks.device), ranks.device)
    whole = sum(seconds for _, seconds in operators)
    return [(name, seconds / whole) for name, seconds in operators]


def show_profile(rows: Sequence[tuple[str, float]]) -> None:
    print("  our step by operator, time of its own:")
    for name, share in rows[:SHOWN]:
        print(f"    {share:>6.1%}  {name}")
    print(f"    {sum(share for _, share in rows[SHOWN:]):>6.1%}  {len(rows[SHOWN:])} others", flush=True)


# ------------------------------------------------------------------------------------------- megatron-core


def megatron_step(
    config: PretrainConfig, vocab_size: int, device: torch.device, dtype: torch.dtype, watch: Stopwatch
) -> Step:
    """megatron-core's BertModel (local spec) in the plain loop, on batches with an attention mask."""
    model = megatron_model(config, vocab_size, dtype)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"]
        chosen = labels >= 0
        losses, binary = model(
            batch["input_ids"], batch["attention_mask"], batch["token_type_ids"], labels.clamp(min=0)
        )
        loss: Tensor = (losses.float() * chosen).sum() / chosen.sum()  # as Megatron-LM's pretrain_bert.py
        if binary is not None:
            loss = loss + F.cross_entropy(binary.float(), batch["next_sentence_label"])
        return loss

    return plain_step(model, loss_of, config, device, watch)


def megatron_model(config: PretrainConfig, vocab_size: int, dtype: torch.dtype) -> nn.Module:
    """BertModel of the config's sizes with weights of its own, on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
        from megatron.core.models.bert.bert_model import BertModel
        from megatron.core.transformer.transformer_config import TransformerConfig

        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        parallel_state._GLOBAL_MEMORY_BUFFER = HostBuffer()
        tensor_parallel.get_cuda_rng_tracker = OneStream
        sizes = config.model
        settings = TransformerConfig(
            num_layers=sizes.num_hidden_layers,
            hidden_size=sizes.hidden_size,
            num_attention_heads=sizes.num_attention_heads,
            ffn_hidden_size=sizes.intermediate_size,
            hidden_dropout=sizes.hidden_dropout_prob,
            attention_dropout=sizes.attention_probs_dropout_prob,
            layernorm_epsilon=sizes.layer_norm_eps,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_cpu_initialization=True,
        )
        model: nn.Module = BertModel(
            config=settings,
            num_tokentypes=2,
            transformer_layer_spec=bert_layer_local_spec,
            vocab_size=padded_vocab_size(vocab_size),
            max_sequence_length=sizes.max_position_embeddings,
            share_embeddings_and_output_weights=True,
            add_binary_head=sizes.sentence_head,
        )
    return model.to(dtype)


class HostBuffer:
    """megatron-core's buffer that is used again for each layer's scores, on the host."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def get_tensor(self, shape: Sequence[int], dtype: torch.dtype, name: str, *_: Any) -> Tensor:
        size = prod(shape)
        if (name, dtype) not in self.buffers or self.buffers[name, dtype].numel() < size:
            self.buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return self.buffers[name, dtype][:size].view(*shape)


class OneStream:
    """In the place of the tracker of CUDA's random numbers: one rank needs one stream."""

    def fork(self, *_: Any) -> AbstractContextManager[None]:
        return nullcontext()


def quickstart_data() -> Path:
    """Returns the quickstart's data; without it, the same data made in runs/benchmark."""
    existing = Path("runs/quickstart/data")
    if (existing / "manifest.json").is_file():
        return existing
    folder = Path("runs/benchmark")
    for command in (
        ["data_prep.docstrings", str(folder)],
        [
            "bertscale",
            "prep",
            "configs/prep/quickstart.yaml",
            f"input=[{folder}/corpus]",
            f"output={folder}/data",
        ],
    ):
        subprocess.run([sys.executable, "-m", *command], check=True)
    return folder / "data"


if __name__ == "__main__":
    sys.exit(main())
