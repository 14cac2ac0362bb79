"""Every page: its commands, options, settings, files and links exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks
from test_config import SECTIONS

from bertscale.cli import COMMANDS, main
from bertscale.config import PretrainConfig, Section, describe_fields

OF_COMMANDS: dict[str, type[Section]] = {**SECTIONS, "bench": PretrainConfig}
KEYS = {name: {key for key, _ in describe_fields(section)} for name, section in OF_COMMANDS.items()}
KEYS["convert"] = {key for key in KEYS["pretrain"] if key.startswith("model.")}  # of a source without one
ALL_KEYS = set().union(*KEYS.values())
GROUPS = {key.split(".")[0] for key in ALL_KEYS if "." in key}
PLACEHOLDERS = {"COMMAND", "STAGE", "CONFIG", "..."}
SETTING = re.compile(r"([a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*)=\S+")
# key=value itself; arguments of iterate_batches, of tokenizers and of SentencePiece's trainer.
NOT_OURS = (
    "key",
    "split",
    "is_split_into_words",
    "add_special_tokens",
    "add_dummy_prefix",
    "add_prefix_space",
    "add_pooling_layer",
    "return_offsets_mapping",
)
FILES = (".py", ".json", ".safetensors", ".md", ".yaml", ".tsv")


def code_of(page: Path) -> list[str]:
    """Lines of the shell blocks of a page, continued ones joined, and its code within sentences."""
    text = page.read_text(encoding="utf-8")
    shell = [block for language, block in blocks(page) if language in ("", "sh", "bash")]
    lines = [line.strip() for block in shell for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [*lines, *spans]


def commands_of(page: Path) -> list[list[str]]:
    """The words after `bertscale` of each call of it, without comments, pipes and what follows them."""
    found = []
    for line in code_of(page):
        called = re.match(r"(?:nohup |nice |srun |apptainer exec .*?\.sif |.*-m )?bertscale (.*)", line)
        if called:
            words = shlex.split(re.split(r"\s[#|>&]|──", called.group(1))[0])
            found.append([word for word in words if word != "\\"])
    return [words for words in found if words]


def help_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, *words in commands_of(page):
        if name in PLACEHOLDERS or name == "--version":
            continue
        assert name in COMMANDS, f"bertscale {name}"
        stage = words[0] if name == "submit" and words and words[0] not in PLACEHOLDERS else None
        options = [word for word in words if re.match(r"--?[a-z]", word) and word != "--help"]
        if options and not (name == "submit" and stage is None):
            text = help_of([name, stage] if stage else [name], capsys)
            unknown = [word for word in options if not re.search(rf"{re.escape(word)}\b", text)]
            assert not unknown, f"bertscale {name} {' '.join(words)}"
        keys = KEYS.get(stage or name, set())
        words = [re.sub(r"^heldout\.\w+=", "heldout=", word) for word in words]  # a set with a name
        unknown = [word for word in words if (found := SETTING.fullmatch(word)) and found[1] not in keys]
        assert not unknown, f"bertscale {name} {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_exist(page: Path) -> None:
    unknown = []
    for code in code_of(page):
        for word in code.split():
            named = SETTING.fullmatch(word)
            key = named[1] if named else word.rstrip(":,")
            key = re.sub(r"^phases\.\w+\.", "", key)  # a key of one phase
            dotted = re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", key) and not key.endswith(FILES)
            is_ours = dotted and key.split(".")[0] in GROUPS
            alone = named is not None and code == word and key not in NOT_OURS
            if (is_ours or alone) and key not in ALL_KEYS | GROUPS:
                unknown.append(word)
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shipped = re.findall(r"\b((?:configs|benchmarks|tests|slurm)/[\w./-]+\.(?:yaml|py|sbatch|sh|def))", text)
    missing = [path for path in shipped if not (ROOT / path).exists() and not re.search("/my[.]|NAME", path)]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing += [link for link in links if link and not (page.parent / link).exists()]
    assert missing == []


def test_the_readme_lists_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [
        page.name for page in PAGES if page.parent.name == "docs" and f"docs/{page.name}" not in text
    ] == []
