"""Settings of the documentation's site; Sphinx builds it and runs all its code."""

import inspect
import os
import re
from functools import partial
from importlib.metadata import version as version_of

from flax import nnx

from attnlab import nn, scores

os.environ["JAX_PLATFORMS"] = "cpu"  # every page runs its code, on any machine

project = "attnlab"
author = copyright = "the authors of attnlab"
version = release = version_of("attnlab")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
]
exclude_patterns = ["_build", "examples"]
html_theme = "sphinx_book_theme"
html_title = "attnlab"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system
html_theme_options = {"navbar_persistent": [], "show_navbar_depth": 1}

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_default_options = {"members": True, "imported-members": True}
autoclass_content = "both"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

# References that lead nowhere are warnings. Names of other projects need no link, and
# some types in signatures are private.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", rf"({name})\..*")
    for name in ("collections", "flax", "jax", "numpy", "os", "pathlib")
]
nitpick_ignore = [
    ("py:class", f"attnlab._src.{name}")
    for name in (
        "nn.cache.View",
        "nn.recurrent.decoders.Memory",
        "nn.weights.loading.M",
        "ops.across.Sharded",
        "ops.validate.Options",
        "pytrees._T",
    )
]

# Classes are shown under their public names, and modules with the arguments of their
# constructors, which Flax hides behind ``*args``.
for name in scores.__all__:
    if isinstance(getattr(scores, name), type):
        getattr(scores, name).__name__ = name


class Default(str):
    """The name of a default that is a function or a class."""

    __repr__ = str.__str__


for module in map(partial(getattr, nn), nn.__all__):
    if isinstance(module, type) and issubclass(module, nnx.Module):
        signature = inspect.signature(module.__init__)
        parameters = [
            x.replace(default=Default(x.default.__qualname__))
            if hasattr(x.default, "__qualname__") and x.default is not x.empty
            else x
            for x in signature.parameters.values()
        ]
        module.__signature__ = signature.replace(parameters=parameters[1:])


def setup(app):
    """Leaves out what only refers, or leads nowhere.

    That is: fields of tuples, defaults from JAX, methods that refer to a class, and
    links from sources back to names that have their entry elsewhere.
    """

    def skip(app, what, name, thing, skipped, options):
        text = inspect.getdoc(thing) or ""
        empty = text.startswith(("Alias for field number", "See :class:"))
        return empty or type(thing).__module__.startswith("jax") or None

    def shorten(app, what, name, thing, options, lines):
        lines[:] = [x for x in lines if not x.startswith("Create new instance of")]

    def unlink(app, page, template, context, doctree):
        if page.startswith("_modules/"):
            link = r'<a class="viewcode-back".*?</a>'
            context["body"] = re.sub(link, "", context["body"])

    app.connect("html-page-context", unlink)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", shorten)
