"""The errors of infra. Each message is one sentence for the user: the value that was wrong and the way out."""

from __future__ import annotations


class InfraError(ValueError):
    """Base of everything infra raises because of what the user gave or of the state of their machine."""


class UnknownName(InfraError):
    """A method, recovery, suite or other plug-in of that name does not exist."""


class NotCanonical(InfraError):
    """A value that has no place in a cache key: NaN, infinity, a set, an object without a JSON form."""


class SettingsInvalid(InfraError):
    """An environment variable SLIMLINE_* has a value that cannot be used."""


class ArtifactMissing(InfraError):
    """The store has no complete artifact under that reference."""


class YamlInvalid(InfraError):
    """A text is no YAML, or says something twice. line: where, counted from 1, if that is known."""

    def __init__(self, problem: str, line: int | None) -> None:
        super().__init__(problem)
        self.line = line

    def __reduce__(self) -> tuple[type[YamlInvalid], tuple[str, int | None]]:
        return type(self), (str(self), self.line)


class DiskFull(InfraError):
    """The device ran out of space while an artifact was written, or has too little left to begin."""


class StoreUnwritable(InfraError):
    """The store's root folder cannot be created or written."""


class StoreUnsafe(InfraError):
    """The store lies on a file system whose locks do not exclude those who share it."""


class LeaseUnusable(InfraError):
    """The host's device leases cannot be read or made."""


class RemoteUnusable(InfraError):
    """The object store that artifacts are shared through cannot be reached, written, or locked."""


class StoreInUse(InfraError):
    """Somebody is at work on what was to be cleared away, moved or replaced."""


class BundleInvalid(InfraError):
    """A file of an exported run is cut short, changed, or holds what has no place in one."""


class SourceMissing(InfraError):
    """A model or data set was found neither in the mirrors nor in the offline default, and the hub is not allowed."""


class SourceInvalid(InfraError):
    """A model or data set was found but cannot be used: pickled weights, NaN in a tensor, a missing config or split."""


class SourceUnreadable(SourceInvalid):
    """The files of a data set are not there or are damaged: not what was asked of it is wrong, but its copy."""


class UploadRefused(InfraError):
    """The hub does not take what is to be uploaded: nobody is logged in, no right to write, a public repository."""


class QuestionRefused(InfraError):
    """SQL that is not one SELECT, or that DuckDB cannot answer."""


class ResultsUnusable(InfraError):
    """The results' folder cannot be read or written, or a file is damaged or was written by a newer slimline."""


class TrackingUnusable(InfraError):
    """The MLflow tracking store cannot be reached, created or written."""
