"""The README.md of a task model: what it is, how it was trained, what it scored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bertscale import __version__
from bertscale.convert.task_names import task_class

if TYPE_CHECKING:
    from bertscale.finetune.loop import Job, Run
    from bertscale.tasks.task import TaskData

PIPELINES = {
    "classification": "text-classification",
    "multi_label": "text-classification",
    "regression": "text-classification",
    "tokens": "token-classification",
    "question_answering": "question-answering",
}


def model_card(job: Job, run: Run, record: dict[str, Any], data: TaskData[Any]) -> str:
    """Returns the card as Markdown, with the metadata that the Hugging Face hub reads."""
    config, task, model = job.config, job.task, job.engine.sizes
    pipeline = PIPELINES.get(task.kind)
    tag = f"pipeline_tag: {pipeline}\n" if pipeline else ""
    facts = {
        "class": task_class(model, task.kind),
        "encoder": f"{model.preset}, {model.num_hidden_layers} layers of {model.hidden_size}, "
        f"{job.engine.num_parameters():,} trained parameters",
        "labels": ", ".join(task.labels[:50]) or "none",
        "examples": f"{len(data.train):,} training, {len(data.dev):,} dev, {len(data.test):,} test",
        "training": f"{record['steps']:,} steps of {config.train.global_batch} examples, best at step "
        f"{record['best_step']:,}; {config.optimizer.name}, learning rate "
        f"{config.optimizer.learning_rate:g}, seed {run.seed}",
        "longest sample": f"{config.samples.max_length} tokens",
    }
    rows = [f"| {name} | {text} |" for name, text in facts.items()]
    figures = [
        f"| {which} | {name} | {value:.4f} |"
        for which in ("dev", "test")
        for name, value in record.get(which, {}).items()
    ]
    lines = [
        f"---\nlibrary_name: transformers\n{tag}tags:\n- bertscale\n---\n",
        f"# {task.kind.replace('_', ' ').capitalize()} model\n",
        f"Fine-tuned by bertscale {__version__}.\n",
        *["| | |", "| --- | --- |", *rows, ""],
        *(["| examples | figure | value |", "| --- | --- | --- |", *figures, ""] if figures else []),
    ]
    if pipeline:
        lines += [
            "```python\nfrom transformers import pipeline\n",
            f'model = pipeline("{pipeline}", "FOLDER")\n```\n',
        ]
    return "\n".join(lines)
