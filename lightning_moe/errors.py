"""Errors that users see: each names the field, the value, what is allowed and what to do about it."""

from __future__ import annotations

from os import PathLike, fspath


class ConfigError(ValueError):
    """A setting that cannot work, reported before anything is lost.

    Args:
        field: Dotted name of the setting, e.g. ``"parallel.expert"``.
        value: The offending value, as given.
        allowed: What would have been accepted, in words.
        hint: What to do about it, in words; empty when ``allowed`` already says it.
        location: ``"file:line"`` of the setting where it came from a file; empty otherwise.
    """

    def __init__(self, field: str, value: object, allowed: str, hint: str = "", location: str = "") -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        self.hint = hint
        self.location = location
        super().__init__(str(self))

    def __str__(self) -> str:
        where = f"{self.location}: " if self.location else ""
        hint = f". Hint: {self.hint}" if self.hint else ""
        return f"{where}{self.field}: {self.value!r} is not allowed; allowed: {self.allowed}{hint}"

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str, str, str]]:
        # Exceptions pickle as cls(*args), and args holds only the message: launchers that carry an error from a
        # worker to the main process would fail on the missing arguments instead of showing this one.
        return type(self), (self.field, self.value, self.allowed, self.hint, self.location)

    def at(self, location: str) -> ConfigError:
        """Return the same error with a ``"file:line"`` location."""
        return type(self)(self.field, self.value, self.allowed, self.hint, location)

    def under(self, prefix: str) -> ConfigError:
        """Return the same error with its field nested under ``prefix``, e.g. ``"trainer.strategy.init_args"``."""
        field = f"{prefix}.{self.field}" if prefix else self.field
        return type(self)(field, self.value, self.allowed, self.hint, self.location)


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or that must not be read.

    Args:
        path: The checkpoint, or the folder that was searched for one.
        reason: What is wrong, in words; names the file, the step and the rank where they are known.
        hint: What to do about it, in words; empty when ``reason`` already says it.
    """

    def __init__(self, path: str | PathLike[str], reason: str, hint: str = "") -> None:
        self.path = fspath(path)
        self.reason = reason
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        hint = f". Hint: {self.hint}" if self.hint else ""
        return f"checkpoint {self.path}: {self.reason}{hint}"

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[str, str, str]]:
        # As above: one rank's error is raised on all others.
        return type(self), (self.path, self.reason, self.hint)
