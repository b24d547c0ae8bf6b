"""The text of HTML pages, by `resiliparse`: as a reader sees it, without scripts, styles and comments."""

from __future__ import annotations

from lamda.config.errors import UserError


def text_of_page(html: str) -> str:
    """The text of a page. Raises UserError if the library is not installed."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError as error:
        raise UserError("HTML needs a library: pip install 'lamda-pytorch[html]'") from error
    return extract_plain_text(html, preserve_formatting=True)
