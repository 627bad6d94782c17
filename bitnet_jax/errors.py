"""The one exception a user's mistake raises: a single line saying what, where and what to do."""


class BitnetError(ValueError):
    """Bad input, told in one line.

    The command prints the message without a traceback and exits with 1; a library user can
    catch it as the `ValueError` it is.

    >>> raise BitnetError("model/kernel: holds NaN; repair or retrain it")
    Traceback (most recent call last):
    bitnet_jax.errors.BitnetError: model/kernel: holds NaN; repair or retrain it
    """
