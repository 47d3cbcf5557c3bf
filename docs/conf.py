"Sphinx's settings: notebooks as pages, mathematics as MathML, nothing from any network."
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
project, author = "sae_lab", "sae_lab contributors"
extensions = ["myst_nb", "mathml"]
html_theme = "pydata_sphinx_theme"
html_theme_options = {"navbar_end": ["theme-switcher"], "show_toc_level": 2, "show_prev_next": True}
html_math_renderer = "mathml"
html_show_sourcelink = False
nb_execution_mode = "off"
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "myst.xref_missing"]
