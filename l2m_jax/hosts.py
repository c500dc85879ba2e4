"""More than one process, on one machine or many: who takes part, and that all go on or all end. After `sharding`.

`l2m train` is started once on every machine (docs/parallel.md). The processes find each other through JAX's coordinator
in process 0, whose key-value store also carries what stands here: values that process 0 decides for all, a sign of life
of each process, and the reason to end. One that fails says why to all; one that is killed says nothing, and is missed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name yet; Orbax takes it from here too
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from l2m_jax.config import UserError

MEETING = 300  # s to find each other
BEAT = 2.0  # s between signs of life
SILENCE = 30.0  # s without one, and a process is taken to be gone
JAX_SILENCE = 80  # s; JAX's own watch, which also notices when process 0 is gone; from half of it on, so ours is first
ADVICE = "start the same command on every machine again: it goes on from the last checkpoint"


def join(coordinator: str, processes: int, process: int) -> None:
    """Takes part with the other processes of a run, before anything is computed; alone, it does nothing.

    Without a `coordinator` (HOST:PORT of process 0) JAX finds the others on TPU pods, under Slurm and under Open MPI.
    UserError where the three do not fit together or the others are not found.
    """
    if coordinator and not (":" in coordinator and coordinator.rsplit(":", 1)[1].isdigit()):
        raise UserError(f"--coordinator {coordinator}: needed: HOST:PORT of process 0, such as 10.0.0.1:8476")
    if bool(coordinator) != (process >= 0) or bool(coordinator) != (processes > 0):
        raise UserError("--coordinator HOST:PORT, --processes N and --process I go together: give all three, or none")
    if coordinator and not process < processes:
        raise UserError(f"--process is {process}; allowed: 0 to {processes - 1}, as --processes is {processes}")
    # Asked without a reason, JAX would take a lone pod of Kubernetes for a cluster too.
    tasks = max(int(os.environ.get(name, 1)) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    if not coordinator and tasks == 1 and not running_in_cloud_tpu_vm:
        return
    given: dict[str, Any] = {"initialization_timeout": MEETING, "heartbeat_timeout_seconds": JAX_SILENCE}
    if coordinator:
        given |= {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
        given["cluster_detection_method"] = "deactivate"
    where = f" at {coordinator}" if coordinator else ""
    unmet = f"the processes did not meet{where} within {MEETING} s: start all of them, with one address, its port open"
    _when_aborted(unmet)
    late = threading.Timer(MEETING + 5, lambda: (_print(unmet), os._exit(2)))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(**given)
    except ValueError as error:
        if coordinator or "coordinator_address" not in str(error):
            raise UserError(f"the processes cannot be joined: {error}") from error
        return  # nothing in the environment speaks of others
    except RuntimeError as error:
        raise UserError(f"{unmet} ({str(error).splitlines()[0]})") from error
    finally:
        late.cancel()
        _when_aborted("")
    if jax.process_count() > 1:
        gone = (
            f"process {jax.process_index()}: aborted, by itself or as another is gone: see above (nothing above: "
            f"process 0 is gone); {ADVICE}"
        )
        _when_aborted(gone)
        _watch()


def lead() -> bool:
    """Whether this is process 0, which alone writes and talks."""
    return jax.process_index() == 0


def decide(name: str, value: Callable[[], str], seconds: float = 600) -> str:
    """What process 0 makes of `value`, for all; each `name` once."""
    if jax.process_count() == 1:
        return value()
    if lead():
        _store().key_value_set(f"l2m/decided/{name}", decided := value())
        return decided
    return _store().blocking_key_value_get(f"l2m/decided/{name}", int(seconds * 1000))


def meet(name: str, seconds: float = 600) -> None:
    """Waits until all processes are here; each `name` once."""
    if jax.process_count() > 1:
        _store().wait_at_barrier(f"l2m/{name}", int(seconds * 1000))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What fails inside ends all processes, with one line that says why: exit status 2, or 1 where it was no UserError.

    Alone, errors go their way.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error = UserError(f"{error.filename or 'a file'} cannot be written: {error.strerror}")
        expected = isinstance(error, UserError) and not isinstance(error.__cause__, ValueError)
        if not expected:  # an exchange that broke off says less than the watch, which knows who is gone
            time.sleep(SILENCE + 3 * BEAT)
        if not isinstance(error, UserError):
            traceback.print_exc()
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0]
        _end(reason, 2 if isinstance(error, UserError) else 1)


def leave() -> None:
    """The end of a run that is done, for all at once."""
    if distributed.global_state.client is not None:
        meet("done")
        _done.set()
        jax.distributed.shutdown()


def rows_here(sharding: NamedSharding, batch: int) -> list[int]:
    """The rows of a batch that this process's devices hold; others may hold the same."""
    found = sharding.addressable_devices_indices_map((batch,)).values()
    return sorted({row for (part,) in found for row in range(batch)[part]})  # pyright: ignore[reportGeneralTypeIssues,reportOptionalIterable]


def place(sharding: NamedSharding, batch: int, rows: Sequence[int], tree: Any) -> Any:
    """Arrays of a batch on the devices of all processes; `tree` has this process's `rows` of it."""
    at = {row: i for i, row in enumerate(rows)}

    def whole(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:  # a slice a dimension
            return x[[at[row] for row in range(batch)[index[0]]]]

        return jax.make_array_from_callback((batch, *x.shape[1:]), sharding, part)

    return jax.tree.map(whole, tree)


class Agreement:
    """The largest number that any process has said at a step, known to all one step later: nobody waits for it."""

    def __init__(self, mesh: Mesh):
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._said: jax.Array | None = None

    def say(self, number: int) -> int:
        """Says this process's number of this step; returns the largest of the step before. Alone, this step's."""
        if jax.process_count() == 1:
            return number
        before = self._said
        mine = np.array([number], np.int32)
        devices = (self._split.mesh.size,)
        self._said = self._largest(jax.make_array_from_callback(devices, self._split, lambda _: mine))
        return 0 if before is None else int(before)


_done = threading.Event()
_aborted: Any = None


def _store() -> Any:
    return distributed.global_state.client


def _end(reason: str, status: int) -> None:
    """Says the reason here and to all, gives them time to read it, and ends the process."""
    text = f"process {jax.process_index()}: {reason}"
    _done.set()
    _print(text)
    with contextlib.suppress(Exception):  # where the store is gone, so are they
        _store().key_value_set(f"l2m/end/{jax.process_index()}", text)
        time.sleep(2 * BEAT)
    os._exit(status)


def _print(text: str) -> None:
    sys.stdout.flush()
    os.write(2, f"l2m: {text}\n".encode())


def _when_aborted(text: str) -> None:
    """What is said last where JAX ends the process with abort(), as where it loses its coordinator; "" for nothing."""

    def aborted(number: int) -> None:
        _print(text)
        os._exit(2)

    global _aborted  # ctypes does not keep it
    _aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted if text else None)


def _watch() -> None:
    """Signs of life, every BEAT; whoever is silent too long ends the run of all."""
    me, count = jax.process_index(), jax.process_count()

    def watch() -> None:
        seen = {i: ("", time.monotonic()) for i in range(count)}
        beat = 0
        while not _done.wait(BEAT):
            beat += 1
            try:
                _store().key_value_set(f"l2m/alive/{me}", str(beat), allow_overwrite=True)
                reasons = [text for _, text in _store().key_value_dir_get("l2m/end")]
                if me == 0 and not reasons:
                    for key, value in _store().key_value_dir_get("l2m/alive"):
                        if seen[i := int(key.rsplit("/", 1)[1])][0] != value:
                            seen[i] = value, time.monotonic()
                    gone = [str(i) for i, (_, last) in seen.items() if time.monotonic() - last > SILENCE]
                    if gone:
                        who = f"process {gone[0]} has" if len(gone) == 1 else f"processes {', '.join(gone)} have"
                        reasons = [
                            f"{who} not been heard of for {SILENCE:.0f} s (killed, or the machine is gone); {ADVICE}"
                        ]
                        _store().key_value_set("l2m/end/watch", reasons[0])
            except Exception:  # the store is gone: JAX aborts this process
                continue
            if reasons and not _done.is_set():
                _print(reasons[0])
                if me == 0:  # the others have read it too before their coordinator is gone
                    time.sleep(4 * BEAT)
                os._exit(2)

    threading.Thread(target=watch, daemon=True, name="l2m watch").start()
