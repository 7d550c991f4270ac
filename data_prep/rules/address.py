"""What tables have around an address and is not part of it."""

# Control characters and white space of Unicode, and the marks without width that copying from pages and
# spreadsheets leaves behind. Browsers strip the first kind only; no address begins or ends with the others.
AROUND = (
    "".join(map(chr, range(0x21)))
    + "\x7f\x85\xa0\u1680\u180e"
    + "".join(map(chr, range(0x2000, 0x2010)))  # spaces of all widths, zero-width marks, directions
    + "\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
)
