"""Hooks of mkdocs: pages that are made from other files of the repository, and formulas.

The site begins with the README. Notebooks become pages from their stored outputs, the API reference
is made of the public names, and links out of docs/ lead to pages or copies on the site.
"""

import base64
import html
import os
import re
from pathlib import Path

import latex2mathml.converter
import nbformat
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

import funcjac

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# Where files of the repository that are not in docs/ are on the site.
PAGES = {
    ROOT / "README.md": "index.md",
    DOCS / "gallery.md": "examples/index.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    ROOT / "funcjac/_demo/data/README.md": "digits.md",
    **{path: f"examples/{path.stem}.md" for path in NOTEBOOKS},
}
SOURCES = {uri: path for path, uri in PAGES.items()}
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s:]+)(#[^)\s]*)?\)")
CARD = re.compile(r"^- \[(.+)\]\((.+)\): (.+)$", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LOADED = re.compile(r'<(?:script|img|iframe)[^>]*src="https?:|<link[^>]*stylesheet[^>]*"https?:')
log = get_plugin_logger("pages")


def on_config(config):
    """Puts notebooks behind the gallery, and pages that the navigation does not name at the end."""
    named = {*re.findall(r"[\w/]+\.md", str(config.nav)), "gallery.md"}
    others = sorted({path.name for path in DOCS.glob("*.md")} - named)
    for entry in config.nav:
        if "Gallery" in entry:
            entry["Gallery"] = [entry["Gallery"], *[PAGES[path] for path in NOTEBOOKS]]
    config.nav += [{"More": others}] * bool(others)
    for name in funcjac.__all__:
        public = getattr(funcjac, name)
        public.__doc__ = _as_markdown(public.__doc__)
    return config


def on_files(files, config):
    """Adds pages that are not in docs/."""

    def add(uri, content):
        files.append(File.generated(config, uri, content=content))

    add("api.md", _reference())
    for path, uri in PAGES.items():
        is_notebook = path.suffix == ".ipynb"
        add(uri, _notebook(path, add) if is_notebook else path.read_text("utf-8"))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns the list of the gallery into cards, and moves links to where the site has things."""
    source = SOURCES.get(page.file.src_uri, DOCS / page.file.src_uri)
    if source.name == "gallery.md":
        markdown = _gallery(markdown)

    def moved(found):
        link, anchor = found.groups(default="")
        target = (source.parent / link).resolve()
        if not target.exists():
            return found[0]  # mkdocs says so
        uri = PAGES.get(target)
        if uri is None and DOCS not in target.parents and target.is_file():
            uri = target.relative_to(ROOT).as_posix()
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(target)))
        uri = uri or os.path.relpath(target, DOCS)
        return f"]({os.path.relpath(uri, os.path.dirname(page.file.src_uri) or '.')}{anchor})"

    parts = FENCE.split(markdown)  # what is in fences is code
    return "".join(p if p.startswith("```") else LINK.sub(moved, p) for p in parts)


def on_page_content(content, **_):
    """Formulas in MathML, which browsers draw without a script."""

    def drawn(found):
        display = "block" if found[1] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(found[2]), display=display)

    return FORMULA.sub(drawn, content)


def on_post_page(output, page, **_):
    """Holds that a page is complete without a network, and that all its formulas are drawn."""
    if found := LOADED.search(output):
        log.warning(f"{page.file.src_uri}: loaded from outside: {found[0]}")
    if "arithmatex" in output:
        log.warning(f"{page.file.src_uri}: a formula is left")


def _as_markdown(doc):
    """A docstring with links in place of roles, which mkdocstrings does not know."""
    names = "|".join(funcjac.__all__)
    doc = re.sub(rf":\w+:`({names})`", r"[`\1`][funcjac.\1]", doc)
    doc = re.sub(r":\w+:(`[\w.]+`)", r"\1", doc)
    doc = re.sub(r"^( +)(Cost|Sources): ", r"\1**\2:** ", doc, flags=re.MULTILINE)
    return re.sub(r"^( +)Example:$", r"\1Examples:", doc, flags=re.MULTILINE)


def _reference():
    """A section for each public name: functions in the order of the README, then classes."""
    readme = (ROOT / "README.md").read_text("utf-8")
    order = sorted(funcjac.__all__, key=lambda name: (name[0].isupper(), readme.find(f"`{name}(")))
    return "# API reference\n\n" + "".join(f"::: funcjac.{name}\n\n" for name in order)


def _notebook(path, add):
    """A notebook in Markdown. Its pictures are files beside it."""
    parts, pictures = [], 0
    for cell in nbformat.read(path, as_version=4).cells:
        is_code = cell.cell_type == "code"
        parts.append(f"```python\n{cell.source}\n```" if is_code else cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                pictures += 1
                uri = f"{path.stem}_{pictures}.png"
                add(f"examples/{uri}", base64.b64decode(data["image/png"]))
                parts.append(f"![Output {pictures}]({uri})")
            else:
                text = output.get("text", data.get("text/plain", "")).strip("\n")
                parts.append(f"```{{.text .output}}\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _gallery(markdown):
    """A card for each notebook: its first picture, its title, what it shows."""
    text, cards = markdown.partition("\n- ")[0], CARD.findall(markdown)
    linked = {link for _, link, _ in cards}
    for path in NOTEBOOKS:
        link = f"../examples/{path.name}"
        if link not in linked:  # until somebody writes a line: how it begins
            first = nbformat.read(path, as_version=4).cells[0].source
            title, beginning = first.lstrip("# ").split("\n\n")[:2]
            cards.append((title, link, beginning.replace("\n", " ")))
    parts = [
        f"-   [![]({Path(link).stem}_1.png)]({link})\n\n    **[{title}]({link})**\n\n    {what}"
        for title, link, what in sorted(cards, key=lambda card: card[1])
    ]
    return f'{text}\n\n<div class="grid cards" markdown>\n\n' + "\n\n".join(parts) + "\n\n</div>\n"
