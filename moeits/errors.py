"""Errors that name bad input: what is wrong, where, and how to fix it. Any other exception is a bug."""


class MoeitsError(ValueError):
    """Bad input. The command line prints it as one line, without a traceback."""


class BudgetError(MoeitsError):
    """No choice keeps that many experts or spends that few bits, or a method has none for this router."""


class MissingError(MoeitsError, FileNotFoundError):
    """A file, a folder or a package is not there."""


class ExistsError(MoeitsError, FileExistsError):
    """The target exists and is not overwritten."""


class PlaceError(MoeitsError, OSError):
    """A folder or file cannot be written, or the disk is too full."""
