"""The site: all pages, all public names, and no link that leads nowhere."""

import importlib.util
import inspect
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import crossover_jax as cj
from crossover_jax import islands, topology

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILD = ROOT / "docs" / "build_site.py"


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("build_site", BUILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sources(site, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "sources"
    site.assemble(folder)
    return folder


def test_the_reference_has_every_public_name_with_its_docstring(sources):
    reference = (sources / "api.md").read_text()
    parts = re.split(r"^## (.*)$", reference, flags=re.MULTILINE)[1:]
    for part, text in zip(parts[::2], parts[1::2], strict=True):
        package = {"crossover_jax": cj, "crossover_jax.topology": topology, "crossover_jax.islands": islands}[part]
        public = {n for n in vars(package) if not n.startswith("_") and not inspect.ismodule(getattr(package, n))}
        public -= {"Any", "sys"}
        assert set(re.findall(r"^### (\w+)$", text, re.MULTILINE)) == public
        for name in public:
            value = getattr(package, name)
            if callable(value):
                assert inspect.getdoc(value).split("\n")[0].replace("<-", "←") in text, name
    assert "* `pool`: who hears whom; it must keep agreement" in reference
    assert "\n".join(("```pycon", ">>> from crossover_jax import by_size, topology")) in reference


def test_every_page_is_in_the_contents_and_every_link_leads_to_one(site, sources):
    pages = {path.stem for path in sources.glob("*.md")}
    assert {name for names in site.CONTENTS.values() for name in names} == pages - {"index"}
    for path in sources.glob("*.md"):
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            assert (sources / (target.partition("#")[0] or path.name)).exists(), (path.name, target)
    for name in ("first", "fsdp_decoder"):
        assert (ROOT / "examples" / f"{name}.py").read_text() in (sources / "examples.md").read_text()


def test_pictures_are_there_and_that_of_an_exchange_is_what_its_pool_says(sources):
    for name in ("index", "start", "concepts", "paper"):
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", (sources / f"{name}.md").read_text()):
            assert (sources / picture).exists(), (name, picture)
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    for picture in pictures.PICTURES:
        assert (ROOT / "docs" / f"{picture.__name__}.svg").read_text() == picture()
    text = pictures.exchange()
    pool, table = pictures.drawn()
    curves = re.findall(r"M\d+ (\d+)C.* (\d+)\" fill=\"none\" stroke=\"(.*?)\"", text)
    rows = sorted({int(start) for start, _, _ in curves})
    arrows = [(rows.index(int(start)), rows.index(int(end))) for start, end, _ in curves]
    n = len(rows)
    for s, p in enumerate(table[0]):
        drawn = np.zeros((n, n))
        for j, i in arrows[s * n : (s + 1) * n]:
            drawn[i, [i, j]] = 0.5
        np.testing.assert_array_equal(drawn, pool.matrix(p))
    assert [pictures.COLOURS[j] for j, _ in arrows] == [colour for _, _, colour in curves]


@pytest.mark.tools
def test_the_site_is_built_without_a_warning_and_a_dead_link_is_one(site, sources, tmp_path):
    pytest.importorskip("sphinx", reason="Sphinx comes with the extra `docs`, which `make docs` installs")
    done = subprocess.run([sys.executable, BUILD, tmp_path / "site"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list((tmp_path / "site").glob("*.html"))) > 15
    with open(sources / "start.md", "a") as page:
        page.write("\n[nowhere](guide.md#nowhere)\n")
    build = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", sources, tmp_path / "dead"]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode != 0
    assert "nowhere" in done.stderr
