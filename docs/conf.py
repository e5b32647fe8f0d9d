"""The site: `python -m sphinx docs site` builds it, without a network."""

import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["PYTHONPATH"] = str(HERE.parent)  # of the kernels that execute the pages
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]

import jaxopt_lab  # noqa: E402

project = "jaxopt-lab"
author = "the jaxopt-lab developers"
copyright = f"2026, {author}"
version = release = jaxopt_lab.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "mathml",
    "signatures",
]
default_role = "py:obj"

autodoc_typehints = "none"  # docstrings say what arguments are; with types, overloads stand thrice
autodoc_member_order = "bysource"  # of classes whose methods are listed
autodoc_preserve_defaults = True  # names of defaults, where their values would be addresses
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
napoleon_use_rtype = False

myst_enable_extensions = ["colon_fence"]
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

html_theme = "sphinx_book_theme"
html_title = "jaxopt-lab"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["scroll.js"]
html_math_renderer = "mathml"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
}
