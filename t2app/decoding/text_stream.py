"""One row's tokens as text that can be shown while they come."""

from transformers import PreTrainedTokenizerBase


class TextStream:
    """One row's tokens as text that only ever grows: a character is shown once all of its bytes are there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.text = ""

    def push(self, token: int) -> str:
        """Add a token and return the text that became certain with it, which may be empty."""
        self._ids.append(token)
        decoded = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        # An unfinished character decodes to U+FFFD at the end; it may yet become another one.
        return self._advance(decoded.rstrip("\ufffd"))

    def finish(self) -> str:
        """The text that was still held back when the row ended."""
        return self._advance(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _advance(self, decoded: str) -> str:
        if len(decoded) <= len(self.text):
            return ""
        piece, self.text = decoded[len(self.text) :], decoded
        return piece
