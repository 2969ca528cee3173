"""What the pages say is so: their programs run, links lead somewhere, commands, files and config keys exist."""

import argparse
import importlib
import importlib.util
import pathlib
import re
import shlex
import sys
import tomllib

import absl.flags
import ml_collections
import numpy as np
import pytest

from benchmarks.network import race_results
from crossover_jax.__main__ import main as crossover_jax
from experiments import csv_rows, flags
from experiments.configs import default
from experiments.frontier import final_bits
from experiments.intervals import paired

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "experiments").glob("*.md")),
]
IN_FORCE = [page for page in PAGES if page.name != "LOG.md"]  # the log's commands are those of their day
PROGRAMS = [page for page in IN_FORCE if "```python" in page.read_text()]


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """The blocks of a page in one language, each behind as many empty lines as stand above it, for tracebacks."""
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


@pytest.mark.parametrize(("name", "row"), [("README.md", 0), ("docs/start.md", 0), ("docs/start.md", 1)])
def test_the_first_program_ends_where_the_start_page_says(name, row):
    """With gossip, and with every worker alone: the second is what a broken exchange would give."""
    start = (ROOT / "docs" / "start.md").read_text()
    algorithm, loss, apart = re.findall(r"^\| `(cj\.\w+\(.*\))`.* \| ([\d.]+) \| ([\d.]+) \|$", start, re.MULTILINE)[
        row
    ]
    program = "".join(list(blocks(ROOT / name, "python"))[: 1 if name == "README.md" else 2])
    first = {}
    exec(re.sub(r"as_optax\(.*?\)\)", f"as_optax({algorithm})", program, count=1), first)
    assert first["loss"].mean() == pytest.approx(float(loss), rel=0.05)
    assert first["cj"].consensus_distance(first["state"][0]) == pytest.approx(float(apart), rel=0.05)


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


def test_the_errors_of_the_start_page_are_the_librarys():
    source = "".join(path.read_text() for path in sorted((ROOT / "crossover_jax").rglob("*.py")))
    source = re.sub(r'"\s*f?"', "", source)  # sentences that go on in the next line
    sentences = re.findall(r'^\|.*\| "(.*)" \|$', (ROOT / "docs" / "start.md").read_text(), re.MULTILINE)
    assert len(sentences) > 10
    assert [sentence for sentence in sentences if sentence not in source] == []


def test_the_page_that_chooses_has_its_figures_from_the_results():
    figures = re.findall(
        r"[+\u2212][\d.]+ ± [\d.]+|\d\.\d{3} (?=bits|by three|with)", (ROOT / "docs/choose.md").read_text()
    )
    measured = (ROOT / "docs/results.md").read_text() + (ROOT / "docs/language_models.md").read_text()
    assert len(figures) > 8
    assert [figure for figure in figures if figure.strip() not in measured] == []


def test_the_tables_of_the_race_are_made_from_its_rows():
    page = (ROOT / "docs" / "performance.md").read_text().splitlines()
    results = race_results.Results(race_results.FORMS["short"], ROOT / "benchmarks" / "network" / "results")
    made = [line for line in results.as_text().splitlines() if line and "---" not in line]
    assert len(made) > 20
    assert [line for line in made if line not in page] == []


@pytest.mark.parametrize(
    ("study", "steps", "row", "best"),
    [("lm_frontier", 1600, r"\| (?=\.)", [0.016, 0.032, 0.016]), ("lm_workers", 800, r"\| at ", [0.032, 0.064, 0.016])],
)
def test_the_learning_rates_of_the_language_model_page_are_the_studies(study, steps, row, best):
    page = (ROOT / "docs" / "language_models.md").read_text()
    shown = [re.findall(r"\d?\.\d+", line) for line in page.splitlines() if re.match(row + r"\.\d{3} \|", line)]
    rows = csv_rows.read(ROOT / "experiments" / "results" / f"{study}.csv")
    arms = ("allreduce", "three rounds in int8", "three rounds in int8 corrected")
    measured = {
        (row["arm"], row["learning_rate"]): row["bits_per_byte"]
        for row in rows
        if row["stage"] == "tuning" and row["step"] == steps
    }
    assert len(shown) == (3 if study == "lm_frontier" else 4)
    for rate, *of_arms in shown:
        assert of_arms == [f"{measured[arm, float(rate)]:.4f}" for arm in arms]
    for arm, rate_of in zip(arms, best, strict=True):
        assert min((bits, rate) for (own, rate), bits in measured.items() if own == arm)[1] == rate_of


LANGUAGE_MODELS = {  # a row of the page, and the arm of a study
    "AllReduce": ("lm_frontier", "allreduce"),
    "gossip, six rounds in int4, `gossip_adamw`": ("lm_frontier", "six rounds in int4 corrected"),
    "gossip, three rounds in int8, `gossip_adamw`": ("lm_frontier", "three rounds in int8 corrected"),
    "gossip, three rounds in int8, AdamW": ("lm_frontier", "three rounds in int8"),
    "NoLoCo, H = 16": ("lm_others", "NoLoCo 16"),
    "DiLoCo, H = 16": ("lm_frontier", "DiLoCo 16"),
    "gossip outer steps, H = 8, three rounds in int8": ("lm_frontier", "gossip outer 8 three rounds in int8"),
    "gossip outer steps, streamed over 16 steps, float32": ("lm_frontier", "streamed 16"),
    "gossip outer steps, H = 16, three rounds in int8": ("lm_frontier", "gossip outer 16 three rounds in int8"),
    "AllReduce of 32": ("lm_workers", "allreduce"),
    "the same gossip of 32, `gossip_adamw`": ("lm_workers", "three rounds in int8 corrected"),
    "the same gossip of 32, AdamW": ("lm_workers", "three rounds in int8"),
    "the oracle of 32": ("lm_workers", "three rounds in int8 oracle"),
}


def bits_of(study):
    return final_bits(csv_rows.read(ROOT / "experiments" / "results" / f"{study}.csv"))


def test_the_tables_of_the_language_model_page_are_the_studies():
    page = (ROOT / "docs" / "language_models.md").read_text()
    bits = {study: bits_of(study) for study in ("lm_frontier", "lm_others", "lm_workers")}
    bits["lm_others"]["allreduce"] = bits["lm_frontier"]["allreduce"]  # what its arms are compared with
    rows = re.findall(r"^\| (.*?) \| [\d.]+ \| ([\d.]+) \| (.*?) ?\| (\d) \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == list(LANGUAGE_MODELS)
    for name, mean, difference, seeds in rows:
        study, arm = LANGUAGE_MODELS[name]
        own = bits[study][arm]
        assert (mean, seeds) == (f"{np.mean(list(own.values())):.4f}", str(len(own))), name
        if arm != "allreduce":
            assert difference == f"{paired(own, bits[study]['allreduce']):.4f}".replace("-", "\u2212"), name


def test_the_table_of_the_islands_page_is_the_studies():
    page = (ROOT / "docs" / "islands.md").read_text()
    problems = [("fashion_mnist", "accuracy", ".2f"), ("lm", "bits_per_byte", ".4f")]
    for name, arm in (("calm", "islands, three rounds"), ("in a storm", "islands, three rounds, storm")):
        (cells,) = re.findall(rf"^\| {name} \| (.*) \|$", page, re.MULTILINE)
        expected = []
        for problem, metric, spec in problems:
            rows = csv_rows.read(ROOT / "experiments" / "results" / f"islands_{problem}.csv")
            of = {own: {row["seed"]: row[metric] for row in rows if row["arm"] == own} for own in ("spmd", arm)}
            expected += [f"{paired(of[arm], of['spmd']):{spec}}".replace("-", "\u2212"), str(len(of[arm]))]
        assert cells.split(" | ") == expected


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", IN_FORCE, ids=name_of)
def test_commands_files_and_config_keys_exist(page):
    text = page.read_text()
    keys = ml_collections.FrozenConfigDict(default.get_config())
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    for path in re.findall(r"(?<![\w./])(?:examples|experiments|benchmarks|docs|tests)/[\w./]*\w", text):
        assert (ROOT / path).exists(), path
    for key in re.findall(r"--config\.([\w.]*\w)", text):
        value = keys
        for name in key.split("."):
            assert name in value, key
            value = value[name]


def commands(page):
    """The words of each line of a page's shell blocks, without comments and variables of the environment."""
    for language in ("bash", "console"):
        for block in blocks(page, language):
            for line in block.replace("\\\n", "").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words


class Understood(Exception):
    pass


@pytest.fixture
def understands(monkeypatch):
    """Whether a program's own parser takes these words; what behind it would run does not."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Understood

    def check(module, words):
        program = importlib.import_module(module)
        if "flags_parser=flags.parse_flags" in pathlib.Path(program.__file__).read_text():
            monkeypatch.setattr(sys, "argv", [module, *words])  # where ml_collections looks for keys of the config
            assert flags.parse_flags(sys.argv) == [module], words  # no word is left over
            for key in [name for name in absl.flags.FLAGS if name.startswith("config.")]:
                delattr(absl.flags.FLAGS, key)  # or the next command may not have it
            return
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Understood):
            program.main(words)
        monkeypatch.undo()

    return check


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections, for a config file
@pytest.mark.parametrize("page", IN_FORCE, ids=name_of)
def test_the_commands_of_a_page_are_understood(page, understands, tmp_path, monkeypatch, capsys):
    """`plan` and `describe` run; of others the flags are parsed, and targets, extras and tests exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in commands(page):
        match words:
            case ["python", "-m", "crossover_jax", "plan" | "describe", *_]:
                with monkeypatch.context() as elsewhere:
                    elsewhere.chdir(tmp_path)
                    assert not crossover_jax(words[3:])
                assert len(capsys.readouterr().out.splitlines()) > 3, words
            case ["python", "-m", "crossover_jax", *rest]:
                understands("crossover_jax.__main__", rest)
            case ["python", "-m", "pip", *_] | ["pip", *_]:
                assert set(re.findall(r"\w+", "".join(re.findall(r"\[(.*)\]", words[-1])))) <= set(extras), words
            case ["python", "-m", module, *rest]:
                understands(module, rest)
            case ["python", path, *rest]:
                understands(path.removesuffix(".py").replace("/", "."), rest)
            case ["make", *targets]:
                made = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
                assert set(targets) <= set(made), words
            case ["pytest", *rest]:
                (file,) = (ROOT / word for word in rest if word.startswith("tests/"))
                word = rest[rest.index("-k") + 1] if "-k" in rest else ""
                assert re.search(rf"def test_\w*{word}", file.read_text()), words
