"""The error that is shown to a person as one line; alone here, so that a batch host loads no pydantic."""


class UserError(ValueError):
    """A mistake that the person can mend: shown as one line without a traceback, exit code 2."""
