"""What is built and released: a typed wheel of the library alone, one version, how to cite."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml

import crossover_jax as cj

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_has_one_place_and_the_files_about_it_say_the_same():
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "crossover_jax.__version__"}
    newest = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cj.__version__ == newest[1] == str(cited["version"])


def test_the_citation_has_the_paper_and_what_the_format_asks_for():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = cited["preferred-citation"]
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2012.15198"}]


def test_every_module_that_the_application_imports_is_in_an_extra():
    """By the distribution that has it; what only tests or tools need is in their extras."""
    extras = PROJECT["project"]["optional-dependencies"]
    named = {re.split(r"[><=\[;]", name)[0].lower().replace("_", "-") for name in extras["experiments"]}
    named |= {re.split(r"[><=]", name)[0].lower() for name in PROJECT["project"]["dependencies"]}
    named |= {"protobuf", "jaxlib"}  # of tensorboardX and jax
    found = set()
    for path in (ROOT / "experiments").rglob("*.py"):
        found |= set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
    ours = {"crossover_jax", "experiments", *sys.stdlib_module_names}
    distributions = importlib.metadata.packages_distributions()
    for module in sorted(found - ours):
        owners = {name.lower().replace("_", "-") for name in distributions.get(module, ())}
        assert not owners or owners & named, f"{module} of {owners}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"  # a copy: setuptools puts what is left of earlier builds into the next one
    shutil.copytree(ROOT / "crossover_jax", sources / "crossover_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "experiments", sources / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", sources]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.tools
def test_the_wheel_is_typed_and_holds_the_library_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {pathlib.PurePath(name) for name in archive.namelist()}
    assert {name.parts[0] for name in names} == {"crossover_jax", f"crossover_jax-{cj.__version__}.dist-info"}
    assert pathlib.PurePath("crossover_jax/py.typed") in names
    sources = {path.relative_to(ROOT) for path in (ROOT / "crossover_jax").rglob("*.py")}
    assert {name for name in names if name.suffix == ".py"} == {pathlib.PurePath(path) for path in sources}


@pytest.mark.tools
def test_the_wheel_runs_the_first_program_where_there_are_the_core_dependencies_alone(wheel, tmp_path):
    """From the registry, which must be reached: what is asked for is what a user's `pip install` brings."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"--constraint={ROOT / 'constraints.txt'}", wheel], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JAX_", "XLA_"))}
    environment["JAX_PLATFORMS"] = "cpu"

    def run(*arguments, **options):
        command = [python, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, **options)

    done = run(ROOT / "examples" / "first.py", timeout=60)  # what a user waits for the first result, at most
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 0.05
    for module in ("flax", "matplotlib", "experiments"):
        assert run("-c", f"import {module}").returncode == 1
    told = run("-c", "import crossover_jax, importlib.metadata as m; print(m.version('crossover_jax'))")
    assert told.stdout.strip() == cj.__version__
    described = run("-m", "crossover_jax", "describe", "latin", "--workers", "8", "--plot", "latin.png")
    assert described.returncode == 2
    assert described.stderr == "`--plot` needs matplotlib, which is missing: `pip install matplotlib`.\n"
