"""Builds the documentation site from the README, the pages and the docstrings (`make docs`).

The sources are the repository itself, so that a link in a page works both on the site and in the
repository.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent

project = "tokenvit_jax"
author = "the authors of tokenvit_jax"
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "docs/**.md",
    "docs/*.ipynb",
    "docs/**.rst",
    "experiments/**.md",
]
exclude_patterns = ["docs/_build", "docs/api/modules.rst"]
extensions = [
    "myst_nb",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]

html_theme = "furo"
html_title = project
html_additional_pages = {"index": "redirect.html"}  # the site starts at the README
templates_path = ["templates"]
smartquotes = False  # "--config" would become a dash

myst_heading_anchors = 3
nb_execution_mode = "off"  # the tutorial is shown with the outputs that it is stored with
nb_output_stderr = "remove"

# One page per module, generated from the files of the package.
apidoc_modules = [
    {
        "path": str(ROOT / "tokenvit_jax"),
        "destination": "docs/api",
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members", "show-inheritance"},
    }
]
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
# One list, like the arguments: as separate objects, short names would be ambiguous.
napoleon_custom_sections = [("Attributes", "params_style")]
default_role = "py:obj"

# ------------------------------------------------------------------------------------------------
# Docstrings are plain text with backticks, bullets and indented commands, which is nearly reST.
# ------------------------------------------------------------------------------------------------

CODE = re.compile(r"(``.+?``|`.+?`)", re.DOTALL)
MARKUP = re.compile(r"(?<!\\)(?:(?P<bullet>^ *[*] )|(?P<sign>[*|]|(?<=\w)_(?!\w)))", re.MULTILINE)
SECTION = re.compile(r"[A-Z]\w+:")


def escape(text: str) -> str:
    """Escapes characters that reST would read as markup, except backticks and bullets."""
    parts = CODE.split(text)  # every second part is code
    parts[::2] = [
        MARKUP.sub(lambda m: m["bullet"] or "\\" + m["sign"], part) for part in parts[::2]
    ]
    return "".join(parts)


def to_rest(lines: list[str]) -> list[str]:
    """Marks indented paragraphs outside of sections as literal, and escapes all others."""
    blocks = [[False, []]]
    section = False
    for previous, line in zip(["", *lines], lines, strict=False):
        if line and not line.startswith(" "):
            section = bool(SECTION.fullmatch(line))
            starts, literal = blocks[-1][0], False
        else:
            literal = blocks[-1][0] or (
                line.startswith("    ") and not previous and not section and bool(blocks[-1][1])
            )
            starts = literal and not blocks[-1][0]
        if starts:
            blocks.append([literal, []])
        blocks[-1][1].append(line)
    rest = []
    for literal, block in blocks:
        rest += ["::", "", *block] if literal else escape("\n".join(block)).split("\n")
    return rest


def list_public(package) -> list[str]:
    """Lists the names that a package offers, with links to the modules that define them."""
    lines = []
    for name in getattr(package, "__all__", ()):
        value = getattr(package, name)
        module = getattr(value, "__module__", None)
        target = f"{module}.{name}" if module else getattr(value, "__name__", name)
        lines.append(f"* :py:obj:`{name} <{target}>`")
    return ["", "Public names:", "", *lines, ""] if lines else []


# The modules that define entries; others import them.
ENTRIES_PAGES = re.compile(r"tokenvit_jax\.(config|tasks\.\w+\.settings)")


def list_entries(entries) -> list[str]:
    """Lists the entries of a configuration, with their defaults, meanings and valid values."""
    rows = [
        f"* ``{key} = {entry.default!r}``: {escape(entry.text)}" for key, entry in entries.items()
    ]
    return ["", "Entries and their defaults:", "", *rows, ""]


def process_docstring(app, what, name, obj, options, lines):
    lines[:] = to_rest(lines)
    if what == "module" and hasattr(obj, "__path__"):
        lines += list_public(obj)
    if what == "module" and ENTRIES_PAGES.fullmatch(name):
        lines += list_entries(obj.ENTRIES)


def shorten_signature(app, what, name, obj, options, signature, annotation):
    """Leaves out the arguments that Flax adds to every module."""
    if signature:
        flax_own = r"(, )?parent: .*?_Sentinel object>, name: str \| None = None"
        signature = re.sub(flax_own, "", signature)
    return signature, annotation


def skip_member(app, what, name, obj, skip, options):
    """Skips fields of named tuples, and names in a package that one of its modules defines."""
    if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number"):
        return True
    if what == "module" and hasattr(obj, "__module__"):
        current = app.env.current_document.autodoc_module
        return True if current and obj.__module__ != current else None
    return None


# ------------------------------------------------------------------------------------------------
# Tables of contents, which only the site needs.
# ------------------------------------------------------------------------------------------------

CONTENTS = {
    "README": [
        ("Guides", ["docs/*"]),
        ("Measurements", ["docs/benchmarks/cpu", "experiments/*/README"]),
        ("Reference", ["docs/api/tokenvit_jax", "CHANGELOG"]),
    ],
    "docs/benchmarks/cpu": [("", ["*"])],
}


def complete_page(app, docname, source):
    """Adds the table of contents, and a title to pages that scripts write without one."""
    titled = docname.startswith("docs/api") or source[0].lstrip().startswith(
        ("#", "{")
    )  # a notebook
    if not titled:
        source[0] = f"# {docname.rsplit('/')[-1].replace('_', ' ').capitalize()}\n\n{source[0]}"
    contents = CONTENTS.get(docname, [])
    if re.fullmatch(r"experiments/\w+/README", docname):
        contents = [("", ["*"])]
    for caption, pages in contents:
        options = [":hidden:", ":glob:", f":caption: {caption}" if caption else ":maxdepth: 1"]
        source[0] += "\n".join(["\n\n```{toctree}", *options, "", *pages, "```"])


def setup(app):
    app.connect("source-read", complete_page)
    app.connect("autodoc-process-docstring", process_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-skip-member", skip_member)
