"""The errors a user can fix, each with the exit code the command line gives for it.

Bad values passed to a function raise plain ``ValueError``; these classes are for what a file, a folder or a number
turned out to be. Every message is one line: what is wrong, where, and how to fix it.
"""

import re

__all__ = [
    "CheckpointError",
    "CheckpointNotFoundError",
    "DataError",
    "DataNotFoundError",
    "ExperimentError",
    "HeadCountError",
    "MTOAnalysisError",
    "NumericalError",
    "OptionNeededError",
    "OutputError",
    "OutputExistsError",
    "RecipeError",
    "RunInUseError",
    "StackError",
    "explained",
]

# CUDA's words, and those of the allocator of CPUs.
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)


class MTOAnalysisError(Exception):
    """Base of all errors a user can fix; ``exit_code`` is what ``mto-analyze`` ends with."""

    exit_code = 1

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(f"{message}; {advice}" if advice else message)
        #: What happened, without ``advice``: how to go on, which depends on who calls.
        self.message = message


class OutputExistsError(MTOAnalysisError):
    """An output file is already there and ``--overwrite`` was not given (exit code 2)."""

    exit_code = 2


class OutputError(MTOAnalysisError, OSError):
    """A file cannot be written: the disk is full or the folder is not writable (exit code 2)."""

    exit_code = 2


class RunInUseError(MTOAnalysisError):
    """Another process works on the run in this folder (exit code 2)."""

    exit_code = 2


class RecipeError(MTOAnalysisError, ValueError):
    """A recipe is unknown, is not whole, or a setting of it is wrong (exit code 2)."""

    exit_code = 2


class ExperimentError(MTOAnalysisError, ValueError):
    """An experiment file cannot be used, or a folder holds another experiment (exit code 2)."""

    exit_code = 2


class CheckpointError(MTOAnalysisError, ValueError):
    """A checkpoint cannot be read, recognized or loaded strictly (exit code 3)."""

    exit_code = 3


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given path (exit code 3)."""


class OptionNeededError(CheckpointError):
    """A checkpoint does not tell a number that has to be given (exit code 3).

    Args:
        message: One line.
        option: The argument of ``load_checkpoint`` that gives it.
        stand_in: A number that fits the file, to look at it without knowing the right one.
    """

    def __init__(self, message: str, option: str, stand_in: float = 1) -> None:
        super().__init__(message)
        self.option = option
        self.stand_in = stand_in


class HeadCountError(OptionNeededError):
    """The number of attention heads is neither in the file nor published for its width (exit code 3)."""


class DataError(MTOAnalysisError, ValueError):
    """Images, masks, tables or logs cannot be read (exit code 4)."""

    exit_code = 4


class DataNotFoundError(DataError, FileNotFoundError):
    """There are no images, masks, tables or logs at the given path (exit code 4)."""


class NumericalError(MTOAnalysisError, ArithmeticError):
    """A computed value is not finite (exit code 5)."""

    exit_code = 5


class StackError(MTOAnalysisError, RuntimeError):
    """Masked tokens of a live model cannot be found, or do not agree with the mask that it was given (exit code 3)."""

    exit_code = 3


def explained(error: BaseException) -> tuple[str, int] | None:
    """A fixable error in one line, with its exit code; ``None`` for a mistake in the program.

    Example:
        >>> explained(DataError("no image")), explained(ValueError("k is 0")), explained(KeyError("k"))
        (('no image', 4), ('k is 0', 2), None)
    """
    message, code = str(error), 2
    if isinstance(error, MTOAnalysisError):
        code = error.exit_code
    elif isinstance(error, OSError):
        message = f"{error.strerror or error}: {error.filename or 'while writing results'}"
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(message)):
        message = "out of memory"
    elif isinstance(error, RuntimeError) and message.startswith("DataLoader"):
        # torch raises it from a signal handler, wherever the program is.
        reason = message.splitlines()[0]
        code = DataError.exit_code
        message = f"a process that decodes images ended ({reason}); often memory is short: use fewer workers"
        if "timed out" in reason:
            message = f"processes that decode images hang ({reason}); decode without workers (num_workers 0)"
    elif not isinstance(error, ValueError):
        return None
    return " ".join(message.split()), code
