"Text that has to stay text wherever it is shown: markup, unseen and unpaired characters, far too much of it."
from hypothesis import strategies as st

HOSTILE = (
    "</script>", "<img src=x onerror=alert(1)>", "\u202eabc\u202c", "\ud83d", "\r\n\t", '" onmouseover="alert(1)', "",
    "x" * 10_000, "</script><script>alert(1)</script>", "\n", "\x00\x1b[31m", "🦊", "&lt;", "</td></table>", " ",
    "\u200b\ufeff", "<script>alert(1)</script>", "\u2066x\u2069", "\udc00", "' style='x", "'`&amp;", "-->", "<!--",
    "]]>", "{{x}}", "\u2028", "e\u0301", "ا")


def texts(most: int) -> st.SearchStrategy[str]:
    "Any text of at most so many characters, and every hostile one."
    return st.text(st.characters(), max_size=most) | st.sampled_from(HOSTILE)
