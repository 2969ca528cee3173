"""What the pages say is so: their programs run, their links lead somewhere, their commands and config keys exist."""

import importlib.util
import pathlib
import re

import ml_collections
import pytest

from experiments.configs import default

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").glob("*.md"))]
IN_FORCE = [page for page in PAGES if page.name != "LOG.md"]  # the log's commands are those of their day
PROGRAMS = [page for page in IN_FORCE if "```python" in page.read_text()]


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """The blocks of a page in one language, each behind as many empty lines as stand above it in the page."""
    text = page.read_text()
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield "\n" * text.count("\n", 0, match.start(1)) + match[1]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PROGRAMS, ids=name_of)
def test_the_programs_of_a_page_run(page):
    namespace = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)  # a traceback names the page and its line


@pytest.mark.parametrize("name", ["README.md", "docs/start.md"])
def test_the_first_program_learns_and_its_workers_agree(name):
    first = {}
    for block in list(blocks(ROOT / name, "python"))[: 2 if "start" in name else 1]:
        exec(block, first)
    zero = {"hidden": first["params"]["hidden"], "out": 0 * first["params"]["out"]}  # as it begins: it predicts 0
    y = first["jax"].random.normal(first["jax"].random.key(0), (256, 16))[:, :2].prod(1)
    assert first["loss"].shape == (8,)
    assert first["loss"].mean() < 0.5 * float((y**2).mean())
    assert first["cj"].consensus_distance(first["state"][0]) < 0.1 * float(abs(zero["hidden"]).sum() ** 0.5)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_and_cells_can_be_read(page):
    text = re.sub(r"\]\([^)\n]*\)", "]", page.read_text())  # where a link leads is not read
    for number, line in enumerate(text.splitlines(), 1):
        longest = max(map(len, line.split("|"))) - 2 if line.startswith("|") else len(line) - 40
        assert longest <= 80, (number, line)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", IN_FORCE, ids=name_of)
def test_commands_and_config_keys_exist(page):
    text = page.read_text()
    keys = ml_collections.FrozenConfigDict(default.get_config())
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    for path in re.findall(r"(?:python|pytest) ([\w./]+\.py)", text):
        assert (ROOT / path).exists(), path
    for key in re.findall(r"--config\.([\w.]*\w)", text):
        value = keys
        for name in key.split("."):
            assert name in value, key
            value = value[name]
