"""How messages put numbers into words, and name what was probably meant."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

_ALIKE = 0.6  # of two words, from which one may have been meant by the other
# `x must be one of a, b, c; got d`, as checks of settings say it
_CHOICE = re.compile(r"must be (?:one of )?((?:[\w.-]+(?:, or |, | or ))+[\w.-]+); got '?([\w.-]+)'?")


def counted(count: int, noun: str) -> str:
    """`1 step`, `1,800 steps`, `2 key frames`, `3 classes`."""
    return f"{count:,} {noun if count == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Of a noun whose last word takes s or es."""
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that is most like this one; None where none is."""
    plain = {each.lower().replace("_", "-"): each for each in reversed(known)}
    found = get_close_matches(word.lower().replace("_", "-"), plain, n=1, cutoff=_ALIKE)
    return plain[found[0]] if found else None


def nearest_flag(flag: str, known: Sequence[str]) -> str | None:
    """The known flag, `--section.name`, that was probably meant: one of the same name in another section, the most like
    it, or one that has it among its words (--lr: --optim.base-lr)."""
    word = flag.lower().replace("_", "-")
    name = word.lstrip("-").rpartition(".")[2]
    names = {each.lstrip("-").rpartition(".")[2]: each for each in reversed(known)}
    if name in names:
        return names[name]
    alike = nearest(word, known) or names.get(nearest(name, list(names)) or "")
    return alike or next((each for each in known if name in re.split("[.-]", each.lstrip("-"))), None)


def did_you_mean(guess: str | None) -> str:
    """What an error adds where it has a guess."""
    return f" (did you mean {guess}?)" if guess else ""


def with_guess(message: str) -> str:
    """A message that something must be one of several words and is another, with the one that was probably meant."""
    found = _CHOICE.search(message)
    if found is None or "did you mean" in message:
        return message
    guess = nearest(found[2], re.split(", or |, | or ", found[1]))
    return message[: found.end()] + did_you_mean(guess) + message[found.end() :]
