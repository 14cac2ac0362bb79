"""One training step, ours against transformers' BertForPreTraining in a plain bfloat16 loop.

    python benchmarks/train_step.py                     # on the quickstart's data, made if it is not there
    python benchmarks/train_step.py --data FOLDER --json FILE

Same sizes, same samples with the same masks, same optimizer (AdamW, clipping at 1), same process, in
turns. Ours is what `bertscale pretrain` runs: DeepSpeed with float32 master weights, samples laid end to
end, the vocabulary on masked positions. Theirs holds everything in bfloat16 and pads to the longest of
the batch. Rates count real tokens; model FLOP/s too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForPreTraining

from bertscale.config import ModelConfig, PretrainConfig
from bertscale.device import measured_peak
from bertscale.engine import Engine
from bertscale.loader import Loader, MicroBatch
from bertscale.mixture import Mixture
from bertscale.model import model_flops_per_token
from bertscale.names import to_hugging_face
from bertscale.optim import parameter_groups
from bertscale.parallel import seed_dropout, start_ranks
from bertscale.pretrain import forward
from bertscale.shards import open_dataset
from bertscale.tokenizer import load_tokenizer

VOCAB = 30_522  # BERT's own; the data's ids are below it
SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 128,
}
CASES = [("4x256", SMALL, 32, 2.0), ("BERT-base", {"max_position_embeddings": 128}, 16, 1.3)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="Output folder of `bertscale prep`.")
    parser.add_argument("--json", type=Path, help="File for the results.")
    parser.add_argument("--rounds", type=int, default=7, help="Turns of each side, after one of warm-up.")
    parser.add_argument("--dropout", type=float, default=0.0, help="Dropout of both models.")
    options = parser.parse_args()
    data = options.data or quickstart_data()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    device = torch.device("cpu")
    ranks = start_ranks(1, device)
    peak = measured_peak(device, torch.bfloat16)
    machine = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bfloat16_peak_gflops": round(peak / 1e9),
    }
    print(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {data}")
    print(f"bfloat16 matrix products: {peak / 1e9:.0f} GFLOP/s at most; dropout {options.dropout}")
    print(f"{'':<12}{'ours':>16}{'transformers':>16}{'ratio':>8}{'goal':>6}   of the peak: ours, theirs")
    results = []
    for name, sizes, batch, goal in CASES:
        model = ModelConfig(
            **sizes,
            hidden_dropout_prob=options.dropout,
            attention_probs_dropout_prob=options.dropout,
        )
        config = PretrainConfig.model_validate(
            {
                "run": "unused",
                "data": str(data),
                "model": model.model_dump(),
                "train": {
                    "steps": 1000,
                    "global_batch": batch,
                    "micro_batch": batch,
                    "precision": "bfloat16",
                },
            }
        )
        dataset = open_dataset(data)
        tokenizer = load_tokenizer(dataset.tokenizer_path)
        mixture = Mixture([dataset], [1.0], config.samples, global_batch=batch, seed=0)
        loader = Loader(mixture, tokenizer, micro_batch=batch, rank=0, world=1)
        batches = [loader.step(k)[0] for k in range(options.rounds + 1)]
        engine = Engine(config, VOCAB, ranks, torch.bfloat16)
        engine.start(0)
        sides: list[Callable[[MicroBatch], float]] = [our_step(engine), their_step(model, engine)]
        rates: list[list[float]] = [[], []]
        shares: list[list[float]] = [[], []]
        for turn, micro_batch in enumerate(batches):
            tokens = len(micro_batch.tokens)
            attended = sum(length**2 for length in micro_batch.lengths) / tokens
            masked = len(micro_batch.targets) / tokens
            flops = tokens * model_flops_per_token(model, VOCAB, attended, masked)
            for side, step in enumerate(sides):
                began = time.perf_counter()
                loss = step(micro_batch)
                seconds = time.perf_counter() - began
                assert 0 < loss < 20
                if turn > 0:
                    rates[side].append(tokens / seconds)
                    shares[side].append(flops / seconds / peak)
        ours, theirs = (statistics.median(each) for each in rates)
        ratio = statistics.median(a / b for a, b in zip(*rates, strict=True))
        of_peak = [statistics.median(each) for each in shares]
        print(
            f"{name:<12}{ours:>10,.0f} tok/s{theirs:>10,.0f} tok/s{ratio:>8.2f}{goal:>6}"
            f"{of_peak[0]:>20.0%}{of_peak[1]:>8.0%}",
            flush=True,
        )
        results.append(
            {
                "case": name,
                "ours": round(ours, 1),
                "peer": round(theirs, 1),
                "unit": "tokens/s",
                "ratio": round(ratio, 3),
                "goal": goal,
                "ours_of_peak": round(of_peak[0], 3),
                "peer_of_peak": round(of_peak[1], 3),
            }
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    return 0


def our_step(engine: Engine) -> Callable[[MicroBatch], float]:
    def step(batch: MicroBatch) -> float:
        seed_dropout(engine.model.parallel, 0, 0, 0, engine.ranks)
        masked, relation, *_ = forward(engine, batch)
        loss = masked / len(batch.targets) + relation / len(batch.lengths)
        engine.backward(loss, last=True)
        engine.step(1e-5)
        return loss.item()

    return step


def their_step(model: ModelConfig, engine: Engine) -> Callable[[MicroBatch], float]:
    """transformers' model with the same first weights; padding is part of the step."""
    sizes = model.model_dump(exclude={"preset"})
    theirs: nn.Module = BertForPreTraining(BertConfig(vocab_size=VOCAB, **sizes)).bfloat16()
    values = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in engine.model.named_parameters():
            for each, value in to_hugging_face(name, parameter, model, VOCAB).items():
                values[each].copy_(value)
    optimizer = torch.optim.AdamW(parameter_groups(theirs, 0.01), lr=1e-5, betas=(0.9, 0.98), fused=True)
    theirs.train()

    def step(batch: MicroBatch) -> float:
        labels = torch.full_like(batch.tokens, -100)
        labels[batch.target_positions] = batch.targets
        output = theirs(
            input_ids=pad(batch.tokens, batch.lengths, 0),
            token_type_ids=pad(batch.token_types, batch.lengths, 0),
            attention_mask=pad(torch.ones_like(batch.tokens), batch.lengths, 0),
            labels=pad(labels, batch.lengths, -100),
            next_sentence_label=batch.next_sentence_label,
        )
        output.loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(output.loss.item())

    return step


def pad(flat: Tensor, lengths: tuple[int, ...], fill: int) -> Tensor:
    """[T] -> [S, longest]."""
    rows = list(torch.split(flat, list(lengths)))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def quickstart_data() -> Path:
    """The quickstart's data; without it, the same made in runs/benchmark."""
    found = Path("runs/quickstart/data")
    if (found / "manifest.json").is_file():
        return found
    made = Path("runs/benchmark")
    for command in (
        ["data_prep.docstrings", str(made)],
        [
            "bertscale",
            "prep",
            "configs/data/quickstart.yaml",
            f"input=[{made}/corpus]",
            f"output={made}/data",
        ],
    ):
        subprocess.run([sys.executable, "-m", *command], check=True)
    return made / "data"


def processor() -> str:
    """The processor's name as the kernel has it."""
    try:
        lines: list[str] = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
