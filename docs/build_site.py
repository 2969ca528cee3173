"""The documentation as a site: the pages of this folder, the README's, the examples, and every public name.

    make docs    # or: python docs/build_site.py build/site

Links and anchors that lead nowhere are errors. Needs `pip install '.[docs]'`; nothing of ours is imported.
"""

import ast
import pathlib
import posixpath
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
OTHERS = {
    "README.md": "index.md",
    "experiments/README.md": "application.md",
    "experiments/LOG.md": "log.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
CONTENTS = {
    "Use it": [
        "start",
        "concepts",
        "examples",
        "choose",
        "guide",
        "language_models",
        "islands",
        "islands_security",
        "scaling",
        "gpus",
        "faq",
        "api",
    ],
    "What was found": ["results", "performance", "reliability"],
    "Behind it": ["paper", "design", "application", "log", "contributing", "changes"],
}
PARTS = {
    name: f"{name.replace('.', '/')}/__init__.py"
    for name in ("crossover_jax", "crossover_jax.topology", "crossover_jax.islands")
}
CONF = """
project = "crossover_jax"
html_title = "crossover_jax"
extensions = ["myst_parser"]
html_theme = "furo"
myst_heading_anchors = 4
"""


def pages() -> dict[str, str]:
    """The site's name of each page, by its path in the repository."""
    own = {f"docs/{path.name}": path.name for path in sorted((ROOT / "docs").glob("*.md"))}
    return {**OTHERS, **own}


def rewritten(text: str, page: str) -> str:
    """A page's links as they are on the site; what is not on it keeps its text alone."""
    names, folder = pages(), posixpath.dirname(page)

    def link(match: re.Match) -> str:
        told, target = match.groups()
        path, _, anchor = target.partition("#")
        whole = posixpath.normpath(posixpath.join(folder, path)) if path else page
        if whole in names:
            # On the site a page has a title, not the name of a file.
            told = title_of(whole) if re.fullmatch(r"`[\w/.]+\.md`|`experiments/`", told) else told
            return f"[{told}]({names[whole]}{'#' if anchor else ''}{anchor})"
        if found := re.fullmatch(r"examples/(\w+)\.py", whole):
            return f"[{told}](examples.md#{found[1]})"
        return f"[{told}]({posixpath.basename(whole)})" if whole.endswith(".svg") else told  # all lie side by side

    text = re.sub(r"\[([^\]]+)\]\((?!https?:)([^)\s]+)\)", link, text)
    return text.replace("```console", "```text")  # commands with a $ before them and no output


def title_of(page: str) -> str:
    return re.search(r"^# (.*)", (ROOT / page).read_text(), re.MULTILINE)[1]  # pyrefly: ignore  # each has one


def examples() -> str:
    """All programs, whole."""
    parts = ["# Examples\n\nWhat gossip added to a program ends in `# new`. What was there stands behind `# was:`."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        parts.append(f"## {path.stem}\n\n```python\n{path.read_text()}```")
    return "\n\n".join(parts) + "\n"


def public_names(part: str) -> Iterator[tuple[str, str]]:
    """Public names of a package, each with the module that has it."""
    for node in ast.parse((ROOT / PARTS[part]).read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module not in ("typing", "crossover_jax"):
            yield from ((alias.asname or alias.name, node.module) for alias in node.names)


def reference() -> str:
    """Every public name with its signature and docstring."""
    parts = ["# Reference\n\nEvery public name. Every example here is run by the tests."]
    for part in PARTS:
        parts.append(f"## {part}")
        for name, module in sorted(public_names(part)):
            if not name.startswith("_"):
                parts.append(entry(name, module))
    return "\n\n".join(parts) + "\n"


def entry(name: str, module: str) -> str:
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    tree = ast.parse(source)
    homes = {alias.name: x.module for x in tree.body if isinstance(x, ast.ImportFrom) for alias in x.names}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            docstring = ast.get_docstring(node)
            assert docstring, f"{module}.{name} has no docstring"
            return f"### {name}\n\n```python\n{header(source, node)}\n```\n\n{as_markdown(docstring)}"
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:  # another name of a function
            was = ast.unparse(node.value)
            return (
                entry(was, homes[was] or "").replace(f"### {was}", f"### {name}").replace(f"def {was}(", f"def {name}(")
            )
    raise ValueError(f"{module} must define {name}.")


def header(source: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    """As it stands in the source, up to the docstring; of a class its fields too."""
    lines = source.splitlines()
    until = node.body[0].lineno - 1
    fields = [ast.unparse(x) for x in node.body if isinstance(x, ast.AnnAssign)]
    return "\n".join([*lines[node.lineno - 1 : until], *(f"    {field}" for field in fields)])


def as_markdown(docstring: str) -> str:
    """Arguments become a list, examples become code; indented equations are code already."""
    parts = []
    for paragraph in docstring.split("\n\n"):
        if paragraph.startswith(">>>"):
            parts.append(f"```pycon\n{paragraph}\n```")
        elif paragraph.startswith("Args:\n"):
            listed = textwrap.dedent(paragraph.removeprefix("Args:\n"))
            parts.append(re.sub(r"^(\w+): ", r"* `\1`: ", listed, flags=re.MULTILINE))
        else:
            parts.append(paragraph.replace("<-", "←"))
    return "\n\n".join(parts)


def assemble(folder: pathlib.Path) -> None:
    """Write the sources of the site."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for page, name in pages().items():
        (folder / name).write_text(rewritten((ROOT / page).read_text(), page))
    for picture in (ROOT / "docs").glob("*.svg"):
        shutil.copy(picture, folder)
    (folder / "examples.md").write_text(examples())
    (folder / "api.md").write_text(reference())
    (folder / "conf.py").write_text(CONF)
    trees = [
        f"\n```{{toctree}}\n:caption: {title}\n:hidden:\n\n{chr(10).join(names)}\n```\n"
        for title, names in CONTENTS.items()
    ]
    with open(folder / "index.md", "a") as file:
        file.writelines(trees)


def main(out: pathlib.Path) -> int:
    """Build the site in `out`; 0 without a warning."""
    from sphinx.cmd import build

    sources = out.with_name(f"{out.name}-sources")
    assemble(sources)
    return build.main(["-W", "--keep-going", "-q", "-E", "-b", "html", str(sources), str(out)])


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(*sys.argv[1:])))
