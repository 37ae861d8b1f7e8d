"""What can go wrong, in one tree.

    D2LLMError
    |- DataError             a file or a text that cannot be used: names the file, the line and what was expected
    |- ModelError            a folder that is no model, or an incomplete or damaged one: names the file
    |- OutputExistsError     a file or folder to be written that exists already (also a DataError and a ModelError)
    |- DeviceError           a device or runtime that was asked for and is not there
    |- MismatchError         two parts that do not belong together: names both
    |- StoreError            an index that cannot be reached, is in use, or is missing
    |- MissingExtraError     an optional dependency that is not installed: names the pip line
    |- ArgumentError         an argument that cannot be: a wrong name, address, filter, number or choice

Every message says what was wrong, the value found, and the way out. A value of the wrong type, such as a single text in
the place of a list, is a `TypeError`.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class D2LLMError(Exception):
    """Base of every error that d2llm raises on purpose."""


class DataError(D2LLMError, ValueError):
    """A file or a text that cannot be used."""


class ModelError(D2LLMError):
    """A folder that is no model, or an incomplete or damaged one."""


class OutputExistsError(ModelError, DataError):
    """A file or folder to be written that exists already."""


class DeviceError(D2LLMError):
    """A device or runtime that was asked for and is not there."""


class MismatchError(D2LLMError, ValueError):
    """Two parts that do not belong together: a model and a collection, two dimensions, two students."""


class StoreError(D2LLMError):
    """An index that cannot be reached, is in use, or is missing."""


class ArgumentError(D2LLMError, ValueError):
    """An argument that cannot be: a wrong name, address, filter, number or choice. The command line reports it as wrong
    usage (exit status 2); all other errors of this tree exit with 1."""


class MissingExtraError(D2LLMError, ImportError):
    """An optional dependency that is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        self.module, self.extra = module, extra
        super().__init__(f"{module} is not installed. Install it with: pip install 'd2llm[{extra}]'")


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        MissingExtraError: `module` itself is not installed (an error inside it is left as it is).
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise MissingExtraError(module, extra) from error
