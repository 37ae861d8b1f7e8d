"""The errors that d2llm raises.

    D2LLMError
    |- DataError             a file or text cannot be used: names the file, the line and what was expected
    |  |- BadRow             one row of an input file cannot be used (in d2llm.readers)
    |- ModelError            a model or student folder is missing, incomplete or damaged: names the file
    |- OutputExistsError     the output file or folder exists already (a ModelError and a DataError)
    |- DeviceError           the requested device or runtime is not available
    |- MismatchError         two parts do not belong together: names both
    |- StoreError            an index cannot be reached, is in use or is missing
    |  |- ChangedError       a document was replaced or removed between two steps of a search
    |- MissingExtraError     an optional dependency is not installed: names the pip command
    |- ArgumentError         an argument is impossible: a wrong name, address, filter, number or choice
    |- ExportError           an exported graph does not compute what torch computes
    |- DivergedError         a loss in training is not finite (in d2llm.train.losses)

Every message says what was wrong, the value, and the way out. A value of the wrong type, such as a single text in place
of a list, raises a `TypeError`.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class D2LLMError(Exception):
    """Base of every error that d2llm raises on purpose."""


class DataError(D2LLMError, ValueError):
    """A file or text cannot be used."""


class ModelError(D2LLMError):
    """A folder is not a model or student, or is incomplete or damaged."""


class OutputExistsError(ModelError, DataError):
    """The file or folder to write exists already."""


class DeviceError(D2LLMError):
    """The requested device or runtime is not available."""


class MismatchError(D2LLMError, ValueError):
    """Two parts do not belong together: a model and a collection, two dimensions, two students."""


class StoreError(D2LLMError):
    """An index cannot be reached, is in use or is missing."""


class ChangedError(StoreError):
    """A document was replaced or removed between two steps of a search."""


class ArgumentError(D2LLMError, ValueError):
    """An argument is impossible: a wrong name, address, filter, number or choice.

    The command line reports it as wrong usage, with exit status 2. The other errors exit with status 1.
    """


class ExportError(D2LLMError):
    """An exported graph does not compute what the trained modules compute. No model folder was written."""


class MissingExtraError(D2LLMError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        self.module, self.extra = module, extra
        super().__init__(f"{module} is not installed. Install it with: pip install 'd2llm[{extra}]'")


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        MissingExtraError: `module` is not installed. Errors that its import raises pass through.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise MissingExtraError(module, extra) from error
