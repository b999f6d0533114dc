"""The pages: their Python runs as written, links lead somewhere, the picture is the script's."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import transformers

import treespec
from treespec import demo

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("treespec/data/**/*.md")]
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def python_blocks(page: str) -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S
    )


def test_quickstart_runs_as_written(capsys):
    blocks = python_blocks("docs/quickstart.md")
    assert len(blocks) >= 5
    # Later blocks build on earlier ones, as they do for a reader.
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/quickstart.md", "exec"), names)
    assert "tokens per round" in capsys.readouterr().out


def test_the_ten_lines_of_the_readme_run(monkeypatch, capsys):
    target, draft, tokenizer = demo.load_demo_pair()
    models = {"Qwen/Qwen2.5-1.5B-Instruct": target, "Qwen/Qwen2.5-0.5B-Instruct": draft}
    (block,) = python_blocks("README.md")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", models.__getitem__)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    inputs = names["inputs"]
    assert torch.equal(names["ids"], target.generate(**inputs, max_new_tokens=200))
    assert "three laws" in capsys.readouterr().out
    assert isinstance(names["spec"], treespec.TreeSpeculator)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://", "#")):
            assert (page.parent / link.split("#")[0]).exists(), f"{page.name}: {link}"


def test_make_targets_on_the_pages_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.M))
    named = {
        target
        for page in PAGES
        for target in re.findall(r"`make ([a-z][\w-]*)", page.read_text(encoding="utf-8"))
    }
    assert {"demo", "test"} <= named <= targets


def test_the_picture_is_what_its_script_draws():
    spec = importlib.util.spec_from_file_location("make_picture", ROOT / "docs" / "make_picture.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    drawn = (ROOT / "docs" / "how_it_works.svg").read_text(encoding="utf-8")
    assert drawn == script.picture()
