"""Full-width forms are those that Unicode says are ASCII's."""

import sys
import unicodedata

from edge_rt.hooks import HALF_WIDTH


def test_the_table_is_that_of_unicode():
    wide = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.decomposition(chr(code)).startswith("<wide>")]
    ascii_forms = {ord(c): ord(half) for c in wide if (half := unicodedata.normalize("NFKC", c)).isascii()}
    assert dict(HALF_WIDTH) == ascii_forms
