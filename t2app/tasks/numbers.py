"""Numbers as people and models write them: with commas, signs, units and currency around them."""

import re
from fractions import Fraction

# A dash after a digit, a letter or a bracket stands between two things and is no sign.
_NUMBER = re.compile(r"(?:(?<![\w)])[-−])?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?")


def last_number(text: str) -> Fraction | None:
    """The last number in a text, or None; "1,234.50", "−3" and "1/2" are each one number."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    numerator, _, denominator = found[-1].replace(",", "").replace("−", "-").partition("/")
    try:
        return Fraction(numerator.strip()) / Fraction(denominator.strip() or 1)
    except (ValueError, ZeroDivisionError):  # more digits than Python reads, or 1/0
        return None
