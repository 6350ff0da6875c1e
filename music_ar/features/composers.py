"""Composers and their eras: one name for each, however a table spells it.

MAESTRO writes "Frédéric Chopin", other tables "Chopin, Frédéric" or "Chopin". `canonical` finds the composer in
`COMPOSERS`; anonymous pieces, arrangements ("Franz Schubert / Franz Liszt") and composers who are not listed have none.
"""

import functools
import re
import unicodedata

BAROQUE, CLASSICAL, ROMANTIC, MODERN = "Baroque", "Classical", "Romantic", "Modern"
ERAS = (BAROQUE, CLASSICAL, ROMANTIC, MODERN)
"""Up to 1750, up to about 1820, the 19th century and those who kept to its style, and from Debussy on."""

COMPOSERS = {
    "Johann Sebastian Bach": BAROQUE,
    "George Frideric Handel": BAROQUE,
    "Johann Pachelbel": BAROQUE,
    "Henry Purcell": BAROQUE,
    "Jean-Philippe Rameau": BAROQUE,
    "Domenico Scarlatti": BAROQUE,
    "Antonio Soler": BAROQUE,
    "Orlando Gibbons": BAROQUE,
    "Ludwig van Beethoven": CLASSICAL,
    "Muzio Clementi": CLASSICAL,
    "Joseph Haydn": CLASSICAL,
    "Wolfgang Amadeus Mozart": CLASSICAL,
    "Isaac Albéniz": ROMANTIC,
    "Charles-Valentin Alkan": ROMANTIC,
    "Mily Balakirev": ROMANTIC,
    "Georges Bizet": ROMANTIC,
    "Johannes Brahms": ROMANTIC,
    "Cécile Chaminade": ROMANTIC,
    "Frédéric Chopin": ROMANTIC,
    "Antonín Dvořák": ROMANTIC,
    "César Franck": ROMANTIC,
    "Alexander Glazunov": ROMANTIC,
    "Mikhail Glinka": ROMANTIC,
    "Charles Gounod": ROMANTIC,
    "Edvard Grieg": ROMANTIC,
    "Franz Liszt": ROMANTIC,
    "Edward MacDowell": ROMANTIC,
    "Nikolai Medtner": ROMANTIC,
    "Felix Mendelssohn": ROMANTIC,
    "Moritz Moszkowski": ROMANTIC,
    "Modest Mussorgsky": ROMANTIC,
    "Ignacy Jan Paderewski": ROMANTIC,
    "Sergei Rachmaninoff": ROMANTIC,
    "Joachim Raff": ROMANTIC,
    "Max Reger": ROMANTIC,
    "Nikolai Rimsky-Korsakov": ROMANTIC,
    "Anton Rubinstein": ROMANTIC,
    "Camille Saint-Saëns": ROMANTIC,
    "Franz Schubert": ROMANTIC,
    "Eduard Schütt": ROMANTIC,
    "Robert Schumann": ROMANTIC,
    "Jean Sibelius": ROMANTIC,
    "Christian Sinding": ROMANTIC,
    "Johann Strauss": ROMANTIC,
    "Richard Strauss": ROMANTIC,
    "Pyotr Ilyich Tchaikovsky": ROMANTIC,
    "Giuseppe Verdi": ROMANTIC,
    "Richard Wagner": ROMANTIC,
    "Carl Maria von Weber": ROMANTIC,
    "Alban Berg": MODERN,
    "Claude Debussy": MODERN,
    "George Enescu": MODERN,
    "George Gershwin": MODERN,
    "Percy Grainger": MODERN,
    "Leoš Janáček": MODERN,
    "Sergei Prokofiev": MODERN,
    "Maurice Ravel": MODERN,
    "Alexander Scriabin": MODERN,
}
"""The composers that a wish may name, with their eras."""
_SPELLINGS = {
    "aleksandr": "alexander",
    "fryderyk": "frederic",
    "ignace": "ignacy",
    "ilich": "ilyich",
    "peter": "pyotr",
}
_SURNAMES_OF_TWO = ("mendelssohn-bartholdy", "mendelssohn bartholdy")


@functools.lru_cache(maxsize=4096)  # training asks for each window
def canonical(name: str | None) -> str | None:
    """The name of a composer as in `COMPOSERS`, or None.

    The surname must be the same, apart from case and accents. Given names may be left out or be initials; those that
    are there must begin with the same three letters, so that a Strauss is not taken for another.

    Args:
        name: "Frédéric Chopin", "Chopin, Frédéric", "F. Chopin" or "Chopin".
    """
    if not name or "/" in name:
        return None
    surname, given = _parts(name)
    for known in COMPOSERS:
        known_surname, known_given = _parts(known)
        pairs = zip(given, known_given, strict=False)
        if surname == known_surname and all(_agree(one, other) for one, other in pairs):
            return known
    return None


def era_of(name: str | None) -> str | None:
    """The era of a composer, by any spelling of the name that `canonical` knows."""
    known = canonical(name)
    return None if known is None else COMPOSERS[known]


def _parts(name: str) -> tuple[str, list[str]]:
    """Surname and given names in plain small letters, without particles such as "van"."""
    plain = _plain(re.sub(r"\(.*?\)", "", name))
    for double in _SURNAMES_OF_TWO:
        plain = plain.replace(double, "mendelssohn")
    last, comma, first = plain.partition(",")
    words = [word for word in re.split(r"[\s.]+", f"{first} {last}" if comma else plain) if word]
    words = [word for word in words if word not in ("van", "von", "de")]
    if not words:
        return "", []
    return words[-1], [_SPELLINGS.get(word, word) for word in words[:-1]]


def _agree(one: str, other: str) -> bool:
    """Whether two given names, or their initials, may be those of the same person."""
    shared = min(len(one), len(other), 3)
    return one[:shared] == other[:shared]


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(character for character in decomposed if not unicodedata.combining(character))
