"""The one exception that LoRAlloy raises for anything a user can cause."""

from __future__ import annotations


class LoralloyError(ValueError):
    """What is wrong, where (file, field, adapter, module or flag), and the way out, in one message.

    Inner code raises the specific cause; outer code that knows more (the operation, the adapter) rewraps it with
    :meth:`within`, so that the user reads one sentence from the outside in.
    """

    def within(self, context: str) -> LoralloyError:
        """The same error with `context` in front, e.g. ``error.within("adapter 'sms_spam'")``."""
        return LoralloyError(f"{context}: {self}")
