"""What can go wrong with a checkpoint, one class a kind. All are `ConversionError`, which is a `ValueError`."""

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Report
else:
    Report = object  # whose file imports this one


class ConversionError(ValueError):
    """Something about a checkpoint or its conversion; the message says what was found and expected, and what to do."""


class SourceNotFound(ConversionError):
    """There is nothing to read: no such directory, repository or revision, or the hub cannot be reached."""


class MalformedCheckpoint(ConversionError):
    """The files are damaged, incomplete, contradict each other, or are in a container that is not read."""


class UnsupportedConfig(ConversionError):
    """config.json asks for an architecture, or states a fact, that this library does not have."""


class UnsafeCheckpoint(ConversionError):
    """A file would do something other than hold tensors, or points outside its directory."""


class NotPushed(ConversionError):
    """The hub did not take a model: no login, no right to write, no such namespace or branch, or no connection."""


class Mismatch(ConversionError):
    """The tensors of the file are not those of the model. `report` says all of it; the message shows it."""

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple:
        # To another process: the operations of `links` are functions, which do not travel.
        return type(self), (str(self), replace(self.report, links=()))
