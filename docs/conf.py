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
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "mathml",
]
exclude_patterns = ["_extensions"]
default_role = "py:obj"

autodoc_typehints = "none"  # the signature has them; arguments are described by hand
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

html_theme = "sphinx_book_theme"
html_title = "jaxopt-lab"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
}
