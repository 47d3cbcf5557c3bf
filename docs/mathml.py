"A Sphinx extension: formulas become MathML, which browsers draw without a script."
from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from latex2mathml.exceptions import NoAvailableTokensError


def mathml(text, display):
    "A formula as MathML; what cannot be read is an error that shows the formula."
    if not text.strip():
        return ""
    try:
        return convert(text, display=display)
    except (NoAvailableTokensError, IndexError, ValueError) as error:
        raise ValueError(f"this formula cannot be read: {text!r}") from error


def inline(translator, node):
    "Write an inline formula."
    translator.body.append(mathml(node.astext(), "inline"))


def block(translator, node):
    "Write a displayed formula."
    translator.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')


def nothing(translator, node):
    "Close nothing: the formula was written whole."


def whole(visit):
    "Write the formula and leave its source text out."
    def write(translator, node):
        visit(translator, node)
        raise SkipNode

    return write


def setup(app):
    "Register the renderer."
    app.add_html_math_renderer("mathml", (whole(inline), nothing), (whole(block), nothing))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
