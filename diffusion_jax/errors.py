"""The one exception that means: what the user gave cannot be used."""


class UserError(ValueError):
    """A config, data set, workdir or command that cannot be used.

    Its message is one line that names the key or file, the value, and the mend;
    main.py prints it without a traceback.
    """
