"""Work that goes on beside training, one job at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class BackgroundWriter:
    """Runs jobs on a thread, one after the other; an error of a job is raised by the next call.

    The thread does not keep the process alive: what is being written when the process ends is lost, and
    :meth:`close` is called before.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job, once the one before is done.

        Raises:
            BaseException: What the job before has raised; this one is not started then.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the job that was submitted.

        Raises:
            BaseException: What it has raised; once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the job that was submitted; nothing runs any more.

        Raises:
            BaseException: What it has raised.
        """
        self.wait()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # also what libraries derive from BaseException: the thread has no other reader
            self._error = error
