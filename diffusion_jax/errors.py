"""The exception for unusable input, and a helper that puts an error message on one line."""


class UserError(ValueError):
    """Reports a config, data set, workdir or command that cannot be used.

    Its message is one line that names the key or file, its value, and what to do.
    main.py prints it without a traceback.
    """


def one_line(error: Exception, limit: int | None = None) -> str:
    """Returns the message of an error on one line, cut to `limit` characters."""
    return " ".join(str(error).split())[:limit]
