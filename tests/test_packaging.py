"""What users install: the wheel, the sdist, an editable install and a bare checkout, each imported
from outside the checkout.

The checkout is copied first, so that building leaves nothing behind in it. Nothing here needs a
network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
LEFT_OUT = (
    ".git",
    ".venv*",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    ".benchmarks",
)


def run(*command: object, cwd: Path, path: tuple[Path, ...] = ()) -> str:
    """Output of a command in `cwd`, with `path` as the only PYTHONPATH."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment.update(HF_HUB_OFFLINE="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def build_wheel(source: Path, into: Path) -> Path:
    into.mkdir(parents=True, exist_ok=True)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", into)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=into)
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(CHECKOUT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    into = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(into)!r})"
    run(sys.executable, "-c", code, cwd=source)
    (archive,) = into.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-index", "--target", target)
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=target)
    return target


@pytest.fixture(scope="module")
def editable(source, tmp_path_factory) -> Path:
    """A virtual environment that sees this one's packages and has the copied checkout installed
    with -e.
    """
    home = tmp_path_factory.mktemp("editable") / "env"
    venv.create(home, with_pip=False, symlinks=True)
    site_packages = Path(
        sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    )
    (site_packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "bin" / "python"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed")
    run(
        sys.executable, "-m", "pip", "--python", python, "install", *options, "-e", source, cwd=home
    )
    return python


@pytest.fixture(scope="module")
def fake_kernels(tmp_path_factory) -> Path:
    """A folder with an installed package named `kernels`, as Hugging Face publishes one."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("BELONGS_TO = 'someone else'\n")
    return folder


# Arguments: "fake" imports the package `kernels`, "transformers" the library that looks for it,
# "load" the demo pair.
IMPORT = """
import json, sys
import treespec, treespec.kernels.ops
seen = {"treespec": treespec.__file__, "ops": treespec.kernels.ops.__file__}
if "transformers" in sys.argv:
    from transformers import LlamaForCausalLM
if "fake" in sys.argv:
    import kernels
    seen["owner"] = kernels.BELONGS_TO
if "load" in sys.argv:
    target, draft, tokenizer = treespec.load_demo_pair()
    seen["text"] = tokenizer.decode(tokenizer("a tree of drafts")["input_ids"])
    seen["training"] = target.training or draft.training
print(json.dumps(seen))
"""


def test_wheel_holds_the_library_and_nothing_else(wheel):
    assert wheel.name.startswith("treespeculator-")
    assert wheel.stat().st_size < 40e6
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"treespec"}
    needed = {
        "treespec/py.typed",
        "treespec/kernels/ops.py",
        "treespec/sources/__init__.py",
        "treespec/data/demo/MODEL_CARD.md",
        "treespec/data/demo/tokenizer.json",
        "treespec/data/demo/target/model.safetensors",
        "treespec/data/demo/draft/model.safetensors",
        "treespec/data/prompts/README.md",
    }
    assert needed <= set(names), needed - set(names)
    # Every module of the checkout is in: a package missing from setup.py would be missed only by
    # users.
    modules = {
        str(path.relative_to(CHECKOUT)).replace("kernels/", "treespec/kernels/", 1)
        for folder in ("treespec", "kernels")
        for path in (CHECKOUT / folder).rglob("*.py")
    }
    assert modules <= set(names), modules - set(names)


def test_wheel_metadata(wheel):
    (name,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA")]
    metadata = zipfile.ZipFile(wheel).read(name).decode()
    import treespec

    for line in (
        "Name: treespeculator",
        f"Version: {treespec.__version__}",
        "Requires-Python: >=3.10",
        "License-Expression: Apache-2.0",
    ):
        assert f"\n{line}\n" in metadata
    assert re.search(r"^Requires-Dist: torch>=", metadata, re.M)


def test_no_init_in_kernels(wheel):
    assert not (CHECKOUT / "kernels" / "__init__.py").exists()
    assert "treespec/kernels/__init__.py" not in zipfile.ZipFile(wheel).namelist()


@pytest.mark.parametrize("fake", [False, True], ids=["alone", "beside-kernels"])
def test_installed_wheel_from_outside(installed, fake_kernels, tmp_path, fake):
    path, more = (
        ((fake_kernels, installed), ("fake", "transformers")) if fake else ((installed,), ("load",))
    )
    seen = json.loads(run(sys.executable, "-c", IMPORT, *more, cwd=tmp_path, path=path))
    assert seen["treespec"].startswith(str(installed))
    assert seen["ops"] == str(installed / "treespec" / "kernels" / "ops.py")
    if fake:
        assert seen["owner"] == "someone else"
    else:
        assert seen["text"] == "a tree of drafts"
        assert seen["training"] is False


@pytest.mark.parametrize("fake", [False, True], ids=["alone", "beside-kernels"])
def test_bare_checkout(source, fake_kernels, tmp_path, fake):
    # Run inside the checkout, the folder `kernels` lies on the import path itself, where
    # transformers looks for a package.
    path, more = ((fake_kernels,), ("fake",)) if fake else ((), ())
    inside = json.loads(
        run(sys.executable, "-c", IMPORT, "transformers", *more, cwd=source, path=path)
    )
    outside = json.loads(
        run(sys.executable, "-c", IMPORT, *more, cwd=tmp_path, path=(*path, source))
    )
    for seen in (inside, outside):
        assert seen["treespec"].startswith(str(source))
        assert seen["ops"] == str(source / "kernels" / "ops.py")
        assert seen.get("owner") == ("someone else" if fake else None)


def test_editable_install(editable, source, fake_kernels, tmp_path):
    seen = json.loads(
        run(editable, "-c", IMPORT, "fake", "transformers", cwd=tmp_path, path=(fake_kernels,))
    )
    assert seen["treespec"].startswith(str(source))
    assert seen["ops"] == str(source / "kernels" / "ops.py")
    assert seen["owner"] == "someone else"
    import treespec

    command = editable.parent / "treespec"
    assert run(command, "--version", cwd=tmp_path) == f"treespec {treespec.__version__}\n"


def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    needed = {
        "LICENSE",
        "Makefile",
        "constraints.txt",
        ".ci/run",
        "kernels/ops.py",
        "tests/conftest.py",
        "benchmarks/train_pair.py",
        "docs/how_it_works.svg",
    }
    assert needed <= names, needed - names
    from_sdist = build_wheel(sdist, tmp_path / "wheel")
    assert sorted(zipfile.ZipFile(from_sdist).namelist()) == sorted(
        zipfile.ZipFile(wheel).namelist()
    )


LAZY = """
import json, sys, time
start = time.perf_counter()
import treespec
seconds = time.perf_counter() - start
treespec.Chain(length=3)
loaded = {name.split(".")[0] for name in sys.modules}
heavy = sorted(loaded & {"torch", "triton", "transformers", "numpy"})
import treespec.kernels.ops
compilers = sorted(name for name in sys.modules if name.startswith(("triton", "torch._inductor")))
print(json.dumps({"seconds": seconds, "heavy": heavy, "compilers": compilers}))
"""


def test_import_is_lazy(installed, tmp_path):
    seen = json.loads(run(sys.executable, "-c", LAZY, cwd=tmp_path, path=(installed,)))
    assert seen["heavy"] == []
    assert seen["compilers"] == []
    assert seen["seconds"] < 0.5


def test_no_page_installs_the_unrelated_package(source):
    # On PyPI the name of the import package belongs to another project.
    wrong = re.compile(r"pip3? install (-\S+ )*[\"']?treespec(?!ulator)\b")
    pages = [
        path
        for path in source.rglob("*")
        if path.suffix in {".md", ".py", ".toml", ".txt"} or path.name == "Makefile"
    ]
    assert len(pages) > 20
    assert [str(path) for path in pages if wrong.search(path.read_text(encoding="utf-8"))] == []
    assert wrong.search("pip install " + "treespec")
