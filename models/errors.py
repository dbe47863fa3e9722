"""Errors that a user can mend, told apart from bugs; here, so that networks can raise them too."""


class UserError(ValueError):
    """What a user can mend, in one line with the value at fault and what is accepted; no traceback."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # values at fault may hold several


class UnknownOption(UserError, TypeError):
    """A keyword that a network does not take, as Python's own error for it."""
