"""Untrusted text (of models, data and files) made safe to show."""


def plain(text: str) -> str:
    """Text with every unprintable character as its escape: control characters, terminal sequences, bidi marks,
    lone surrogates. Line breaks stay.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
