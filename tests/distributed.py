"""A pool of warmed worker processes that run a function on several gloo ranks, for tests.

Importing torch and Lightning takes seconds, so the processes are forked from one server that has imported
them, and are kept for the whole test run. A test gets the pool from the ``ranks`` fixture::

    def sum_of_ranks(factor: int) -> float:  # a module-level function, or a functools.partial of one
        value = torch.tensor(float(dist.get_rank() * factor))
        dist.all_reduce(value)
        return value.item()


    def test_sum(ranks: RankPool) -> None:
        assert ranks.run(2, sum_of_ranks, 10) == [10.0, 10.0]

Every job starts from a known state: the caller's environment variables and working directory, all random
generators seeded with 0, default dtype, one thread. Whatever it changed is undone afterwards.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, Self

MAX_WORLD_SIZE = 4
"""Most ranks a test may ask for: the suite has to run on two cores."""

_PRELOAD = ["torch", "torch.distributed", "lightning.pytorch", "pytest"]
_GLOO_TIMEOUT = timedelta(seconds=60)
_START_TIMEOUT = 300.0
# After the first failure, time for the other ranks to fail by themselves: a test may want every rank's error.
_GRACE = 3.0


class RankFailure(Exception):  # noqa: N818 (a failure of ranks, whatever the error was)
    """A job failed on at least one rank; ``__cause__`` is the exception of the rank that failed first.

    Ranks that communicate with a failed one soon fail as well, with a connection error.

    Args:
        errors: Exception of each rank that raised, died (:class:`ChildProcessError`) or hung
            (:class:`TimeoutError`), in the order in which they failed; not of ranks that were stopped because
            another one failed.
        tracebacks: Remote traceback, or for a hung rank the stacks of its threads.
        stopped: Ranks that were still running some seconds after the first failure, and were killed.
    """

    def __init__(
        self,
        errors: Mapping[int, BaseException],
        tracebacks: Mapping[int, str],
        stopped: tuple[int, ...] = (),
    ) -> None:
        self.errors = dict(errors)
        self.tracebacks = dict(tracebacks)
        self.stopped = stopped
        parts = [f"rank {rank}: {error!r}\n{tracebacks[rank]}" for rank, error in errors.items()]
        if stopped:
            parts.append(f"still running and killed: ranks {', '.join(map(str, stopped))}")
        super().__init__("\n" + "\n".join(parts))


class RankPool:
    """Worker processes, one per rank, that are started when first needed and replaced after a failure."""

    def __init__(self) -> None:
        self._context = get_context("forkserver")
        self._workers: list[_Worker] = []
        self._jobs = 0
        self._store: Any = None
        self._stack_files = tempfile.TemporaryDirectory(prefix="rank-stacks-")

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        init_process_group: bool = True,
        timeout: float = 120,
        **kwargs: Any,
    ) -> list[Any]:
        """Call ``function(*args, **kwargs)`` on every rank, as if launched by torchrun.

        Args:
            world_size: Number of ranks, at most :data:`MAX_WORLD_SIZE`.
            function: Module-level function, or a partial of one; it is pickled by reference.
            *args: Its arguments; tensors are copied.
            init_process_group: Whether the pool initialises gloo before the call. False leaves it to the
                function, e.g. to Lightning, which finds a torchrun environment and joins, launching nothing.
                Either way once a job: ranks that initialise again meet the addresses of the first time.
            timeout: Seconds for the whole job, after which ranks that have not returned are killed.
            **kwargs: Its keyword arguments.

        Returns:
            The return values in rank order; tensors are copies.

        Raises:
            RankFailure: A rank raised, died or hung. The next call gets new processes.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size must be in [1, {MAX_WORLD_SIZE}], got {world_size}")
        workers = self._start(world_size)
        call = pickle.dumps((function, args, kwargs))
        self._jobs += 1
        # The function may initialise by itself, from the environment, and so needs a store without old keys.
        store = self._store if init_process_group else _new_store()
        try:
            for rank, worker in enumerate(workers):
                environment = os.environ | _torchrun_environment(rank, world_size, store.port, self._jobs)
                worker.send(_Job(call, environment, os.getcwd(), list(sys.path), init_process_group))
            return _collect(workers, timeout)
        except BaseException:
            # A failed job may leave anything behind: half-open connections, hooks, threads.
            self.close()
            raise

    def close(self) -> None:
        """End every worker process; the next :meth:`run` starts new ones."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _start(self, world_size: int) -> list[_Worker]:
        if not all(worker.process.is_alive() for worker in self._workers):
            self.close()
        if len(self._workers) < world_size:
            if self._store is None:
                self._store = _new_store()
            self._context.set_forkserver_preload(_PRELOAD)
            new = [self._new_worker(rank) for rank in range(len(self._workers), world_size)]
            self._workers += new
            for worker in new:
                if not worker.connection.poll(_START_TIMEOUT) or worker.connection.recv_bytes() != b"ready":
                    raise RuntimeError(f"worker process {worker.rank} did not start")
        return self._workers[:world_size]

    def _new_worker(self, rank: int) -> _Worker:
        here, there = self._context.Pipe()
        stacks = Path(self._stack_files.name, f"{rank}-{time.monotonic_ns()}")
        # Not a daemon: daemonic processes may not have children, and data loaders have.
        arguments = (there, rank, str(stacks), self._store.port)
        process = self._context.Process(target=_serve, args=arguments, name=f"rank-{rank}")
        process.start()
        there.close()
        return _Worker(rank, process, here, stacks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._stack_files.cleanup()


@dataclass(frozen=True)
class _Job:
    call: bytes
    environment: dict[str, str]
    directory: str
    path: list[str]
    init_process_group: bool


@dataclass(frozen=True)
class _Reply:
    payload: bytes
    """Pickled return value, or pickled exception."""
    traceback: str = ""
    """Empty for a return value."""


# --- the parent's side


@dataclass(frozen=True)
class _Worker:
    rank: int
    process: Any
    connection: connection.Connection
    stacks: Path

    def send(self, job: _Job) -> None:
        # A worker that dies at once is reported by _collect, which sees its pipe closed.
        with contextlib.suppress(BrokenPipeError):
            self.connection.send_bytes(pickle.dumps(job))

    def dump_stacks(self) -> str:
        """The Python stacks of a worker that hangs, as its fault handler prints them."""
        with contextlib.suppress(OSError):
            os.kill(self.process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and not self.stacks.stat().st_size:
            time.sleep(0.01)
        time.sleep(0.05)
        return self.stacks.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _collect(workers: list[_Worker], timeout: float) -> list[Any]:
    """Wait for every worker's reply; raises RankFailure, and may then leave workers running."""
    waiting: dict[object, _Worker] = {worker.connection: worker for worker in workers}
    values: dict[int, Any] = {}
    errors: dict[int, BaseException] = {}
    tracebacks: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while waiting and (remaining := deadline - time.monotonic()) > 0:
        for ready in connection.wait([worker.connection for worker in waiting.values()], remaining):
            worker = waiting.pop(ready)
            try:
                reply: _Reply = pickle.loads(worker.connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                worker.process.join()
                death = ChildProcessError(f"exit code {worker.process.exitcode}")
                reply = _Reply(pickle.dumps(death), "process died")
            if not reply.traceback:
                values[worker.rank] = pickle.loads(reply.payload)
                continue
            if not errors:
                deadline = min(deadline, time.monotonic() + _GRACE)
            errors[worker.rank], tracebacks[worker.rank] = pickle.loads(reply.payload), reply.traceback
    if errors:
        stopped = tuple(sorted(worker.rank for worker in waiting.values()))
        raise RankFailure(errors, tracebacks, stopped) from next(iter(errors.values()))
    if waiting:
        hung = {worker.rank: worker for worker in waiting.values()}
        errors = {rank: TimeoutError(f"no result after {timeout} s") for rank in sorted(hung)}
        tracebacks = {rank: hung[rank].dump_stacks() for rank in errors}
        raise RankFailure(errors, tracebacks) from next(iter(errors.values()))
    return [values[rank] for rank in range(len(workers))]


def _new_store() -> Any:
    """Serve a key-value store from this process, as torchrun's agent does.

    The system picks the port while the server opens it: a port found by probing could be taken by another
    program before rank 0 listens on it.
    """
    import torch.distributed as dist

    return dist.TCPStore(  # type: ignore[attr-defined]  # public, but torch's stubs do not re-export it
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )


def _torchrun_environment(rank: int, world_size: int, port: int, job: int) -> dict[str, str]:
    """What torchrun sets on one node, so that Lightning detects its TorchElasticEnvironment."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "ROLE_RANK": str(rank),
        "ROLE_NAME": "default",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_WORLD_SIZE": "1",
        "ROLE_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": f"tests-{job}",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        # No rank starts before all are connected: a rank that fails early would otherwise give its peers a
        # connection error in the middle of their initialisation, and a test the wrong set of errors.
        "TORCH_DIST_INIT_BARRIER": "1",
        "OMP_NUM_THREADS": "1",
        # Resolving the host's own name can take seconds, or fail, on a machine without network.
        "GLOO_SOCKET_IFNAME": next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0")),
    }


# --- the worker's side


def _serve(pipe: connection.Connection, rank: int, stacks: str, store_port: int) -> None:
    """Run jobs until the parent closes the pipe."""
    import torch
    import torch.distributed as dist
    from lightning_utilities.core.rank_zero import rank_zero_only

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to pytest, which then closes the pool
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    rank_zero_only.rank = rank  # type: ignore[attr-defined]  # an attribute of the function, as Lightning sets it
    # One connection for all jobs: torch looks up a name for each new one, which takes seconds where no name
    # server answers.
    store = dist.TCPStore(  # type: ignore[attr-defined]  # as above
        "127.0.0.1", store_port, is_master=False
    )
    # Everything imported so far is out of the collector's sight, or each job's collection would take 0.2 s.
    gc.collect()
    gc.freeze()
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        pipe.send_bytes(b"ready")
        while True:
            try:
                job: _Job = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            pipe.send_bytes(pickle.dumps(_execute(job, store)))


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _execute(job: _Job, store: Any) -> _Reply:
    try:
        with _job_state(job, store):
            function, args, kwargs = pickle.loads(job.call)
            return _Reply(pickle.dumps(function(*args, **kwargs)))
    except BaseException as error:
        return _Reply(_pickle_exception(error), traceback.format_exc())
    finally:
        gc.collect()


def _pickle_exception(error: BaseException) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # exceptions with required arguments often pickle and then fail here
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__qualname__}: {error}"))
    return data


@contextlib.contextmanager
def _job_state(job: _Job, store: Any) -> Iterator[None]:
    """Give a job the parent's environment and known seeds, and undo afterwards what jobs commonly change."""
    import numpy as np
    import torch
    import torch.distributed as dist

    environment, directory, path = dict(os.environ), os.getcwd(), list(sys.path)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    _replace_environment(job.environment)
    os.chdir(job.directory)
    sys.path[:] = job.path
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        if job.init_process_group:
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(os.environ["TORCHELASTIC_RUN_ID"], store),  # type: ignore[attr-defined]
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=_GLOO_TIMEOUT,
            )
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        sys.path[:] = path
        os.chdir(directory)
        _replace_environment(environment)


def _replace_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
