"""The one exception that means: what the user gave cannot be used; and other errors as one line."""


class UserError(ValueError):
    """A config, data set, workdir or command that cannot be used.

    Its message is one line that names the key or file, the value, and the mend;
    main.py prints it without a traceback.
    """


def one_line(error: Exception, limit: int | None = None) -> str:
    """What an error of a library says, on one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]
