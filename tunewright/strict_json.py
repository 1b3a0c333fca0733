"""JSON as the rest of the world reads it: what Python's parser lets through by mistake is refused here.

Refused: duplicate keys, NaN and infinities (also `1e999`), numbers over 32 characters, lone surrogates, NUL, nesting over
32 levels, more than 10,000 keys in one object, anything but UTF-8.
"""
