"Any text is shown as text, and nothing in it goes unseen."
import html
import unicodedata
from html.parser import HTMLParser

from hostile import texts
from hypothesis import given
from hypothesis import strategies as st

from sae_lab.ground.html import escape, number, table, tint, visible

words = texts(30)
UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""
    def handle_starttag(self, tag, attrs): self.tags.append(tag)
    def handle_data(self, data): self.text += data


@given(words)
def test_escape_leaves_only_text(text):
    reader = Reader()
    reader.feed(f'<p title="{escape(text)}">{escape(text)}</p>')
    reader.close()
    assert reader.tags == ["p"] and reader.text == visible(text)


@given(words)
def test_nothing_is_unseen(text):
    shown = visible(text)
    assert not [c for c in shown if unicodedata.category(c) in UNSEEN]
    shown.encode("utf-8")
    assert html.unescape(escape(text)) == shown


values = words | st.floats() | st.integers() | st.none()


@given(st.lists(st.dictionaries(st.sampled_from(["a", "<b>", "c"]), values, max_size=3), max_size=4))
def test_tables_hold_only_table_tags(rows):
    reader = Reader()
    reader.feed(table(rows, caption="<script>"))
    assert set(reader.tags) <= {"table", "caption", "tr", "th", "td"}


@given(st.floats() | st.integers(-10**30, 10**30) | st.none())
def test_numbers_are_short(x):
    assert 0 < len(number(x)) <= 10


@given(st.floats(1e-6, 1e12))
def test_numbers_are_near(x):
    text = number(x).replace(",", "")
    scale = {"M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1])
    value = float(text[:-1]) * scale if scale else float(text)
    assert abs(value / x - 1) < 0.006


@given(st.floats())
def test_tint_is_a_colour(share):
    colour = tint(share)
    assert len(colour) == 9 and int(colour[1:], 16) >= 0
