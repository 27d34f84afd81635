"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in a recipe, a path, a shard or a command line.

    The message is one or two plain sentences: which file or key, what was wrong, what was expected, what to do.
    The command line prints it without a traceback and exits with status 2; nothing has been overwritten by then.
    """
