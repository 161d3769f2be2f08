"""Plain prose out of a MediaWiki XML export, for the `demo` text source.

mwparserfromhell's own `strip_code` drops every template, which leaves sentences such as "is about  long"
where a unit conversion stood. Here the templates that carry a sentence's words are rendered, and a paragraph
with anything that cannot be rendered is left out whole.
"""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import IO, Any

import mwparserfromhell

# Private-use characters: they mark what the renderer cannot turn into text, and survive until the lines
# are judged one by one.
_HOLE = "\ue000"
_LIST = "\ue001"
_HEADING = "\ue002"

_SKIPPED_SECTIONS = {
    "see also", "references", "external links", "further reading", "notes", "bibliography", "footnotes",
    "sources", "works", "works cited", "citations", "publications", "filmography", "discography",
    "notes and references", "references and notes", "gallery", "general references", "primary sources",
}  # fmt: skip

_SKIPPED_TAGS = {"ref", "references", "table", "gallery", "source", "syntaxhighlight", "timeline", "imagemap"}
_UNRENDERABLE_TAGS = {"math", "chem", "score", "hiero", "code", "pre", "poem", "tt"}
_LIST_TAGS = {"li", "dd", "dt"}

# Templates that stand in the middle of a sentence and whose value is one of their arguments.
_ARGUMENT_TEMPLATES = {
    "lang": 1, "transl": -1, "nowrap": 0, "smaller": 0, "small": 0, "big": 0, "nobold": 0, "sc": 0,
    "vanchor": 0, "quote": 0, "script": 1, "as of": 0, "angbr": 0, "visible anchor": 0, "abbr": 0,
    "railgauge": 0, "linktext": 0, "rtl-lang": 1, "nihongo": 0, "mvar": 0, "var": 0, "em": 0, "strong": 0,
    "age in years": 0, "flag": 0, "flagcountry": 0, "color": 1, "ship": 1, "uss": 0, "large": 0,
    "nq": 0, "tooltip": 0,
}  # fmt: skip

_LITERAL_TEMPLATES = {
    "'": "'", "'s": "'s", "' \"": "' \"", "\" '": "\" '", "nbsp": " ", "thinsp": " ", "spaces": " ",
    "snd": " – ", "spnd": " – ", "spaced ndash": " – ", "ndash": "–", "mdash": "—", "mdashb": "—",
    "emdash": "—", "endash": "–", "-": "", "!": "|", "=": "=", "circa": "c. ", "c.": "c. ", "pi": "π",
    "dot": " · ", "zwj": "", "shy": "", "ad": "AD", "bc": "BC",
}  # fmt: skip

# Templates that print a footnote mark, a maintenance note or a pronunciation: the sentence reads on without
# them. Matched at the start of the name.
_SILENT_TEMPLATES = re.compile(
    r"(cite\b|citation|vcite|sfn|harv|efn|refn|ref\b|rp$|r$|note|anchor|citation needed|cn$|fact$|clarify|"
    r"when$|who$|which$|why$|by whom|according to whom|vague|dubious|page needed|better source|verify|failed|"
    r"full$|full citation|specify|quantify|disputed|original research|synthesis|weasel|peacock|not in|"
    r"update|dead link|ipa|respell|usdict|audio|pron|listen|coord|use |pp-|clear|-$|main|see also|further|"
    r"details|about|for$|other|redirect|distinguish|hatnote|infobox|unreliable|medcn|medrs|citequote|"
    r"flagicon|clarifyme|contradict|relevance|lopsided|undue|pov|tone|sic$|void|hsp|zwnj|year needed|"
    r"refimprove|qualify|bibleref|inflation-fn|#tag:ref|examples|elucidate|need quotation|"
    r"request quotation|volume needed|isbn|issn|oclc|doi|pmid)"
)


def articles(dump: IO[bytes]) -> Iterator[tuple[str, str]]:
    """(title, wikitext) of every article in a MediaWiki XML export, in the dump's order.

    Redirects, other namespaces than the article space, and disambiguation pages are left out.
    """
    for _, element in ElementTree.iterparse(dump):
        if element.tag.rpartition("}")[2] != "page":
            continue
        fields = {child.tag.rpartition("}")[2]: child for child in element.iter()}
        text = fields["text"].text or ""
        title = fields["title"].text or ""
        if (
            fields["ns"].text == "0"
            and "redirect" not in fields
            and not re.search(r"\{\{\s*(disambig|geodis|hndis|surname)", text, re.IGNORECASE)
            and not title.startswith("List of ")
        ):
            yield title, text
        # iterparse keeps every finished element; the dump is many times larger as a tree than as text.
        element.clear()


def prose(wikitext: str) -> str:
    """The running text of one article, paragraphs separated by a blank line; headings, lists, tables,
    footnotes, formulas and captions are left out. Empty when nothing reads as prose."""
    rendered = _render(mwparserfromhell.parse(wikitext, skip_style_tags=False))
    paragraphs = []
    skipped_level = 0
    for line in rendered.split("\n"):
        if line.startswith(_HEADING):
            level, heading = int(line[1]), line[2:].strip().lower()
            if skipped_level and level > skipped_level:
                continue
            skipped_level = level if heading in _SKIPPED_SECTIONS else 0
        elif not skipped_level:
            paragraph = _tidy(line)
            if _reads_as_prose(paragraph):
                paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _render(code: Any) -> str:
    return "".join(_render_node(node) for node in code.nodes)


def _render_node(node: Any) -> str:
    kind = type(node).__name__
    if kind == "Text":
        return str(node.value)
    if kind == "Wikilink":
        title = str(node.title).strip()
        namespace = title.partition(":")[0].strip().lower()
        if namespace in {"file", "image", "category", "media"} or re.match(r"[a-z-]{2,12}:", title):
            return ""
        return _render(node.text) if node.text is not None else title.lstrip(":")
    if kind == "ExternalLink":
        return _render(node.title) if node.title is not None else ""
    if kind == "HTMLEntity":
        return str(node.normalize() or "")
    if kind == "Heading":
        return f"\n{_HEADING}{node.level}{_render(node.title)}\n"
    if kind == "Tag":
        return _render_tag(node)
    if kind == "Template":
        return _render_template(node)
    return _HOLE if kind == "Argument" else ""


def _render_tag(node: Any) -> str:
    name = str(node.tag).strip().lower()
    if name in _SKIPPED_TAGS:
        return ""
    if name in _UNRENDERABLE_TAGS:
        return _HOLE
    if name in _LIST_TAGS:
        return _LIST
    if name in {"br", "hr"}:
        return " "
    inner = _render(node.contents) if node.contents is not None else ""
    if name == "sup" and inner.strip("0123456789+-−n") == "":
        return inner.translate(str.maketrans("0123456789+-−n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻ⁿ"))
    if name in {"blockquote", "div", "center"}:
        return f"\n{inner}\n"
    return inner


def _render_template(node: Any) -> str:
    name = re.sub(r"[\s_]+", " ", str(node.name)).strip().lower()
    positional = [parameter.value for parameter in node.params if not parameter.showkey]
    if name in _LITERAL_TEMPLATES:
        tail = _render(positional[0]).strip() if name in {"circa", "c."} and positional else ""
        return _LITERAL_TEMPLATES[name] + tail
    if name in {"convert", "cvt"} and len(positional) >= 2:
        return _convert([_render(value).strip() for value in positional])
    if name in {"frac", "fraction", "sfrac"} and 1 <= len(positional) <= 3:
        parts = [_render(value).strip() for value in positional]
        whole = f"{parts[0]} " if len(parts) == 3 else ""
        return f"{whole}{parts[-2] if len(parts) > 1 else 1}/{parts[-1]}"
    if name == "chem":
        return "".join(_render(value).strip() for value in positional)
    if name.startswith("lang-") and positional:
        return _render(positional[0])
    if name in _ARGUMENT_TEMPLATES and positional:
        index = _ARGUMENT_TEMPLATES[name]
        return _render(positional[index]) if index < len(positional) else _HOLE
    return "" if _SILENT_TEMPLATES.match(name) else _HOLE


_UNITS = {
    "mi": "miles", "km": "kilometres", "ft": "feet", "m": "metres", "in": "inches", "cm": "centimetres",
    "mm": "millimetres", "sqmi": "square miles", "km2": "square kilometres", "sqkm": "square kilometres",
    "acre": "acres", "ha": "hectares", "lb": "pounds", "kg": "kilograms", "g": "grams", "t": "tonnes",
    "F": "°F", "C": "°C", "K": "K", "nmi": "nautical miles", "mph": "miles per hour", "yd": "yards",
    "km/h": "kilometres per hour", "ft/s": "feet per second", "m/s": "metres per second", "L": "litres",
    "impgal": "imperial gallons", "USgal": "US gallons", "sqft": "square feet", "m2": "square metres",
    "m3": "cubic metres", "kPa": "kilopascals", "psi": "pounds per square inch", "kW": "kilowatts",
    "hp": "horsepower", "tonne": "tonnes", "miles": "miles", "mile": "miles", "foot": "feet", "kn": "knots",
    "metre": "metres", "°C": "°C", "°F": "°F", "degF": "°F", "degC": "°C", "sqm": "square metres",
}  # fmt: skip


def _convert(values: list[str]) -> str:
    """What {{convert}} prints for its first quantity; the converted one in brackets is left out."""
    joints = {"-": "–", "–": "–", "to": " to ", "and": " and ", "by": " by ", "x": " by ", "or": " or "}
    if len(values) >= 4 and values[1] in joints:
        quantity, unit = values[0] + joints[values[1]] + values[2], values[3]
    else:
        quantity, unit = values[0], values[1]
    return f"{quantity} {_UNITS[unit]}" if unit in _UNITS else _HOLE


def _tidy(line: str) -> str:
    # Entities inside link targets and attributes never become nodes of their own.
    line = html.unescape(line).replace("\xa0", " ").replace("\u2009", " ").replace("\u200b", "").replace("'''", "")
    line = line.replace("''", "")
    line = re.sub(r"__[A-Z]+__", "", line)
    line = re.sub(r"[ \t]+", " ", line)
    # Dropped pronunciations and footnotes leave orphaned brackets and commas behind.
    for _ in range(3):
        line = re.sub(r"([(\[]) *(?:(?:[,;:]|or\b|and\b|pronounced\b) *)+", r"\1", line)
        line = re.sub(r" *(?:[,;:] *)+([)\]])", r"\1", line)
        line = re.sub(r" ?\( *\)| ?\[ *\]", "", line)
    line = re.sub(r" +([,.;:!?)])(?!\.)", r"\1", line)
    line = re.sub(r",(?: ?,)+", ",", line)
    return re.sub(r"\( +", "(", line).strip()


_LEFTOVERS = re.compile(r"[\ue000-\ue002|{}<>]|\[\[|\]\]|https?:|^[!*#:;]")


def _reads_as_prose(paragraph: str) -> bool:
    """Whether a line is a paragraph of complete sentences rather than a caption, a list or a fragment."""
    return (
        len(paragraph) >= 80
        and not _LEFTOVERS.search(paragraph)
        and paragraph[-1] in ".!?\"”')"
        and (paragraph[0].isupper() or paragraph[0] in "\"“'(" or paragraph[0].isdigit())
        and sum(character.isalpha() or character == " " for character in paragraph) >= 0.85 * len(paragraph)
        and sum(character > "\u024f" for character in paragraph) < 0.1 * len(paragraph)
    )
