"""Full-width forms are those that Unicode says are ASCII's, and what uses them reads them as it did."""

import sys
import unicodedata

from edge_rt.hooks import HALF_WIDTH
from edge_rt.plugins.punctuation.characters import FULL_WIDTH_ALNUM, TO_ASCII
from edge_rt.plugins.terminology.words import narrow


def test_the_table_is_that_of_unicode():
    wide = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.decomposition(chr(code)).startswith("<wide>")]
    ascii_forms = {ord(c): ord(half) for c in wide if (half := unicodedata.normalize("NFKC", c)).isascii()}
    assert dict(HALF_WIDTH) == ascii_forms


def test_what_plugins_make_of_it():
    every = "".join(map(chr, HALF_WIDTH)) + "中\xa0é"
    assert narrow(every) == every.translate(HALF_WIDTH).replace("\xa0", " ")
    assert "".join(map(chr, TO_ASCII)) == "".join(FULL_WIDTH_ALNUM.findall(every)), "punctuation changes letters and digits alone"
    assert every.translate(TO_ASCII) == FULL_WIDTH_ALNUM.sub(lambda found: found[0].translate(HALF_WIDTH), every)
