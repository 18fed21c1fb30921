"""What the pages say can be done: every command parses, every flag, file and link exists, every example runs.

Blocks are found, not listed: a new one is covered by being written. Python is run, unless its fence says
` ```python no-run `; then it is compiled, and its imports and the settings that it names must exist. Commands are run
where the images are the digits or an earlier command of the page made what they read, and parsed otherwise.
"""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from markdown_it import MarkdownIt
from torch.distributed.run import get_args_parser

import factor_transfer.method.factor_transfer
from factor_transfer.cli import app
from factor_transfer.config import FIELDS
from factor_transfer.settings import RECIPES, recipes
from factor_transfer.util.checks import flag
from processes import Command

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
SHELL = {"", "sh", "bash", "console"}
HEREDOC = re.compile(r"<<\s*'?(\w+)'?\n(.*?)\n\1$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    place: str
    info: str
    text: str

    @property
    def language(self) -> str:
        return self.info.split()[0] if self.info else ""


def blocks(page: Path, languages: set[str]) -> list[Block]:
    found = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    fences = [token for token in found if token.type == "fence" and token.map]
    named = [Block(f"{page.name}:{token.map[0] + 1}", token.info.strip(), token.content) for token in fences]
    return [block for block in named if block.language in languages]


def inline(page: Path, kind: str) -> list[tuple[str, str]]:
    """Spans of code, or targets of links, and where they are."""
    found = []
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or []:
            if child.type == kind:
                text = child.content if kind == "code_inline" else str(child.attrs["href"])
                found.append((f"{page.name}:{token.map[0] + 1 if token.map else '?'}", text))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The commands in shell text, as words: without comments, redirections and the bodies of here-documents."""
    plain = HEREDOC.sub("", text).replace("\\\n", " ")
    for line in plain.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="<>|&;")
        lexer.whitespace_split = True
        command: list[str] = []
        words = iter(lexer)
        for word in words:
            if set(word) <= set("|&;"):
                yield command
                command = []
            elif set(word) <= set("<>"):
                next(words, None)
            else:
                command.append(word)
        yield command


def ours(text: str) -> Iterator[list[str]]:
    """What is given to factor-transfer in shell text, started by whatever starts it."""
    for command in commands(text):
        for start, word in enumerate(command):
            if word == "factor-transfer":
                yield command[start + 1 :]
                break
            if word == "factor_transfer" and command[start - 1] == "-m":
                yield command[start + 1 :]
                break
            if " " in word and re.search(r"factor[-_]transfer ", word):  # bash -c '...'
                yield from ours(word)


def flags_of(command: str) -> set[str]:
    collection = app[command].assemble_argument_collection()
    return {name for argument in collection for name in (*argument.names, *argument.negatives)} | {"--help"}


@cache
def every_flag() -> set[str]:
    return {flag for command in app if not command.startswith("-") for flag in flags_of(command)} | {*app}


def check_command(words: list[str]) -> None:
    """Flags exist and values are of their kind, as the command line itself sees it; `...` stands for others."""
    if "..." in words or not words:
        unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - flags_of(words[0])
        assert not unknown, f"{words[0]} has no {unknown}"
        return
    if "--config" in words and words[words.index("--config") + 1].removeprefix("recipe:") not in recipes():
        place = words.index("--config")
        words = [*words[:place], *words[place + 2 :]]
    app.parse_args(words, exit_on_error=False, print_error=False)


def check_other(command: list[str]) -> None:
    """Scripts, make's targets and extras that are named exist."""
    if command[:1] in (["python"], ["python3"]) and command[1:] and command[1].endswith(".py"):
        assert (ROOT / command[1]).exists(), command
    elif command[:1] == ["make"]:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(command[1:]) <= set(targets), command
    elif command[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"\[([\w,-]+)\]", " ".join(command))
        assert {name for names in named for name in names.split(",")} <= set(extras), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_docs__every_command_parses(page: Path) -> None:
    for block in blocks(page, SHELL):
        for words in ours(block.text):
            try:
                check_command(words)
            except Exception as error:
                raise AssertionError(f"{block.place}: factor-transfer {shlex.join(words)}\n{error}") from error
        for command in commands(block.text):
            check_other(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_docs__every_flag_and_script_in_the_text_exists(page: Path) -> None:
    """Flags of others are torchrun's, accelerate's, or those of the page's own blocks (SLURM)."""
    parsers = get_args_parser(), launch_command_parser()
    theirs = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    theirs |= set(re.findall(r"--[a-z][\w-]*", "".join(block.text for block in blocks(page, SHELL))))
    for place, span in inline(page, "code_inline"):
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", span))
        assert flags <= every_flag() | theirs, f"{place}: {span}"
        for command in commands(span) if span.startswith(("python ", "make ", "pip ")) else ():
            check_other(command)
        for words in ours(span) if "factor-transfer " in span else ():
            assert words[0].startswith("-") or words[0] in app, f"{place}: {span}"


@pytest.mark.parametrize("name", recipes())
def test_docs__the_command_in_each_recipe_parses_and_the_page_has_it(name: str) -> None:
    comments = re.findall(r"^#   (.*)$", (RECIPES / f"{name}.yaml").read_text(), re.MULTILINE)
    for words in ours("\n".join(comments)):
        check_command(words)
        assert f"recipe:{name}" in words
    assert comments or name == "demo"
    assert f"`{name}`" in (ROOT / "docs" / "recipes.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_docs__every_python_block_compiles_and_names_what_exists(page: Path) -> None:
    shell = blocks(page, SHELL)
    scripts = [Block(block.place, "", body) for block in shell for _, body in HEREDOC.findall(block.text)]
    for block in [*blocks(page, {"python"}), *scripts]:
        tree = ast.parse(block.text, block.place)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(ast.unparse(node), {})
            elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "distill":
                unknown = {word.arg for word in node.keywords if word.arg} - set(FIELDS)
                assert not unknown, f"{block.place}: distill has no {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_docs__every_link_leads_somewhere(page: Path) -> None:
    for place, target in inline(page, "link_open"):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{place}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{place}: {target}"


def test_docs__the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert "automodule:: factor_transfer.method.factor_transfer" in page
    apart = set(dir(factor_transfer)) - {"__version__", *vars(factor_transfer.method.factor_transfer)}
    assert apart >= {"distill", "FactorTransferError"}
    assert [name for name in sorted(apart) if f":: factor_transfer.{name}\n" not in page] == []


def test_docs__the_page_of_settings_is_what_the_code_says() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "settings.py"))["page"]()
    assert (ROOT / "docs" / "settings.md").read_text() == made, "run `make settings`"
    assert [name for name in FIELDS if f"\n### {flag(name)}\n" not in made] == []


def cheap(words: list[str], folder: Path) -> bool:
    """Whether a command may be run: on the digits, or on what an earlier one has left."""
    if not words or "..." in words:
        return False
    if words[0] in {"demo", "recipes"} or "--help" in words:
        return True
    if "--data" in words:
        return words[words.index("--data") + 1] in {"digits", "fashion"}
    return len(words) > 1 and not words[1].startswith("-") and (folder / words[1]).exists()


def runnable(page: Path) -> bool:
    texts = [block.text for block in blocks(page, SHELL)]
    return bool([1 for text in texts for words in ours(text) if cheap(words, Path("/nowhere"))] or
                [1 for block in blocks(page, {"python"}) if "no-run" not in block.info])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if runnable(page) and page.stem != "quickstart"],  # test_quickstart.py runs that one
    ids=lambda page: page.stem,
)
def test_docs__what_can_be_run_runs(page: Path, factor_transfer: Command, python: Command, tmp_path: Path) -> None:
    """A page's blocks from top to bottom, in one folder."""
    for block in blocks(page, {*SHELL, "python"}):
        done = []
        if block.language == "python":
            done += [] if "no-run" in block.info else [python(block.text, cwd=tmp_path)]
        else:
            done += [python(body, cwd=tmp_path) for _, body in HEREDOC.findall(block.text)]
            done += [factor_transfer(*words, cwd=tmp_path) for words in ours(block.text) if cheap(words, tmp_path)]
        for each in done:
            assert each.returncode == 0, f"{block.place}: {each.args}\n{each.stdout}\n{each.stderr}"
