"""The code in the README and in docs/ runs, and the files, options and links there exist."""

from __future__ import annotations

import io
import json
import re
import shlex
from contextlib import redirect_stdout
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

markdown_it = pytest.importorskip("markdown_it")

from lightning_alrc.spikes import Spike  # noqa: E402

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = {"ledger.md"}
"""tests/test_docs_ledger.py runs this page with the dataset that it needs."""
LANGUAGES = {"python", "text", "console", "json", "yaml", "tree"}


class Block(NamedTuple):
    """A block of code, and the number of its first line in the page."""

    language: str
    code: str
    line: int


@cache
def blocks(page: Path) -> list[Block]:
    # What is inside of paragraphs is not parsed: it takes most of the time.
    tokens = markdown_it.MarkdownIt().disable("inline").parse(page.read_text())
    return [
        Block(token.info.strip(), token.content, token.map[0] + 1)
        for token in tokens
        if token.type in ("fence", "code_block")
    ]


def pages_with(language: str) -> list[Any]:
    """Parameters of a test: each page with blocks in a language, and these blocks."""
    found = [(page, [b for b in blocks(page) if b.language == language]) for page in PAGES]
    return [pytest.param(page, each, id=page.name) for page, each in found if each]


def run(page: Path, names: dict[str, Any]) -> None:
    """Run a page's Python blocks one after the other.

    A block of text must be the end of what the Python block before it printed. An error names the
    page's line.
    """
    printed = None
    for block in blocks(page):
        if block.language == "python":
            printed = io.StringIO()
            padded = "\n" * block.line + block.code
            with redirect_stdout(printed):
                exec(compile(padded, str(page), "exec"), names)
        elif block.language == "text":
            assert printed is not None, f"{page.name}:{block.line} follows no block of Python"
            end = printed.getvalue()[-len(block.code) :]  # Lightning may print text before
            assert end == block.code, f"{page.name}:{block.line}"


@pytest.fixture
def readers_names() -> dict[str, Any]:
    """The names that a reader of the README already has."""
    import pytorch_lightning
    import torch
    from torch.nn import functional

    class Net(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def forward(self, x: Any) -> Any:
            return self.layer(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return functional.mse_loss(self(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    x = torch.randn(64, 3)
    y = x.sum(1, keepdim=True)
    y[40] = 1e4
    samples = torch.utils.data.TensorDataset(x, y)
    return {
        "__name__": "readme",
        "F": functional,
        "LightningModule": pytorch_lightning.LightningModule,
        "Trainer": pytorch_lightning.Trainer,
        "data": torch.utils.data.DataLoader(samples, batch_size=4),
        "net": Net(),
        "torch": torch,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("page", "found"), [each for each in pages_with("python") if each.id not in RUN_ELSEWHERE]
)
def test_python_runs(
    page: Path,
    found: list[Block],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    readers_names: dict[str, Any],
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run(page, readers_names if page.name == "README.md" else {"__name__": page.stem})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_in_a_tested_language(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES


@pytest.mark.parametrize(("page", "found"), pages_with("yaml"))
def test_yaml_blocks_configure_lightnings_command_line(
    page: Path, found: list[Block], tmp_path: Path
) -> None:
    from pytorch_lightning.cli import LightningCLI
    from pytorch_lightning.demos.boring_classes import BoringModel

    for block in found:
        path = tmp_path / "config.yaml"
        path.write_text(block.code)
        made = LightningCLI(BoringModel, run=False, args=["--config", str(path)])
        assert any(type(each).__name__ == "ALRCCallback" for each in made.trainer.callbacks)


@pytest.mark.parametrize(("page", "found"), pages_with("json"))
def test_json_blocks_are_lines_of_the_record(page: Path, found: list[Block]) -> None:
    for block in found:
        fields = json.loads(block.code)
        del fields["run"]
        assert set(fields) == set(Spike._fields)
        Spike(**fields)


@pytest.mark.parametrize(("page", "found"), pages_with("tree"))
def test_files_in_a_tree_exist(page: Path, found: list[Block]) -> None:
    for block in found:
        folder = ROOT
        for line in block.code.splitlines():
            path = line.split()[0]
            folder = folder if line.startswith(" ") else ROOT / path
            assert (folder / path if line.startswith(" ") else folder).exists(), line


SETTING = re.compile(r"`((?:ALRC|ALRCCallback|Trainer)\([^`]*\))`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_the_text_are_accepted(page: Path, readers_names: dict[str, Any]) -> None:
    from lightning_alrc import ALRC, ALRCCallback

    names = readers_names | {"ALRC": ALRC, "ALRCCallback": ALRCCallback}
    for expression in SETTING.findall(page.read_text()):
        if "..." not in expression:
            eval(expression, names)


COMMAND = re.compile(r"`((?:[A-Z_]+=\S+ )?python -m [^`]*)`")


def commands(page: Path) -> list[str]:
    """Command lines of a page, in blocks and in the text."""
    lines = [line for b in blocks(page) if b.language == "console" for line in b.code.splitlines()]
    return [*lines, *(found.replace("\n", " ") for found in COMMAND.findall(page.read_text()))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_existing_modules_extras_and_files(page: Path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for command in commands(page):
        for module in re.findall(r"-m ((?:examples|tests|lightning_alrc|pytest)[\w.]*)", command):
            assert find_spec(module) is not None, command
        for listed in re.findall(r"\[([\w,]+)\]'", command):
            assert set(listed.split(",")) <= set(project["optional-dependencies"]), command
        for word in shlex.split(command, comments=True):
            for path in _expanded(word):
                if path.startswith(("tests/", "examples/", "docs/")):
                    assert (ROOT / path).exists(), command


def _expanded(word: str) -> list[str]:
    """The words that a shell makes of a word with braces. Brackets around the word are dropped."""
    word = word.strip("[]")
    inside = re.search(r"\{([^}]*)\}", word)
    if inside is None:
        return [word]
    return [word.replace(inside[0], each) for each in inside[1].split(",")]


def test_arguments_in_commands_exist() -> None:
    """Each argument in a command is a parameter or a field in the program's source.

    jsonargparse adds ``--config`` to each program.
    """
    for page in PAGES:
        for command in commands(page):
            module = re.search(r"-m ((?:examples|lightning_alrc)[\w.]*)", command)
            if module is None:
                continue
            source = '"--config"' + "".join(path.read_text() for path in _sources(module[1]))
            for argument in re.findall(r"(?<= )--([a-z][\w-]*)", command):
                name = argument.replace("-", "_")
                assert re.search(rf"\b{name}: |[\"']--{argument}\b", source), (command, argument)


def _sources(module: str) -> list[Path]:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin)
    return sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]


LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in headings(target), f"{page.name}: {link}"


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    assert len(text.split()) <= 1500
