"""Worlds: machines and networks that go back together. A test run is one, and so is each fork."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import Any, Self, TypeVar

    from firn._firn import Checkpoint, Logger, Machine, Run, VLan

    T = TypeVar("T")


class World:
    """Machines and networks that can be kept, taken back and forked together.

    `driver` is the test's own world. Its forks have the same machines, as attributes:

        with driver.fork() as world:
            world.server.succeed("rm -rf /var/lib/postgresql")
        server.succeed("ls /var/lib/postgresql")        # this one has not changed
    """

    def __init__(self, run: Run, logger: Logger, name: str = "") -> None:
        """Take a run and its log; `name` tells forks apart."""
        self.name = name
        self.logger = logger
        self.machines: list[Machine] = list(run.machines)
        self.vlans: list[VLan] = list(run.vlans)
        self._run = run
        self._checkpoints = 0
        self._forks = 0

    def __getattr__(self, name: str) -> Machine:
        """Give the machine or the machine's variable of this name."""
        machines: list[Machine] = self.__dict__.get("machines", [])
        for machine in machines:
            if machine.variable == name:
                return machine
        raise AttributeError(f"{type(self).__name__} has no {name!r}, which is no machine either")

    def start_all(self) -> None:
        """Start all machines. Does not wait for the guests to boot."""
        self._run.start_all()

    def join_all(self) -> None:
        """Wait until all machines have powered off."""
        self._run.join_all()

    def subtest(self, name: str, isolated: bool = False) -> AbstractContextManager[None]:
        """Group what a `with` block does: a step in the log, a test case in the report.

        With `isolated=True`, all machines and networks go back afterwards to what they were before.
        """
        if not isolated:
            return self.logger.subtest(name)
        from contextlib import contextmanager

        @contextmanager
        def subtest() -> Iterator[None]:
            with self.logger.subtest(name), self.checkpoint(f"before {name}"):
                yield

        return subtest()

    def checkpoint(self, name: str = "") -> Checkpoint:
        """Keep what all machines, networks and shared directories are, to go back to.

            checkpoint = driver.checkpoint("installed")
            machine.succeed("rm -rf /etc")
            checkpoint.rollback()               # as often as wanted

        In a `with` statement, the end of the block goes back. Machines that run must take
        commands, that is, have booted; those under QEMU cannot go back. What guests share with
        directories of yours stays as it is; `/tmp/shared` and `/tmp/xchg` go back.

        Raises MachineError if a machine cannot be kept, and says why; nothing has changed then.
        """
        self._checkpoints += 1
        return self._run.checkpoint(name or str(self._checkpoints))

    def fork(self, checkpoint: Checkpoint | None = None, name: str = "") -> World:
        """Make another world that goes on from here, or from a checkpoint, while this one does too.

            with driver.fork() as world:
                world.server.succeed("systemctl stop postgresql")
                world.client.fail("psql -h server -c 'select 1'")

        Its machines have the same names and addresses as this world's, on networks of their own,
        and share memory and disks with them until one of both writes. What reaches a guest by a
        port of the host does so by another port, which the log names. What guests share with
        directories of yours is the same for all worlds.

        It ends with the `with` block, by close(), or with the test. Raises MachineError if the
        checkpoint is gone, or for the reasons of checkpoint().
        """
        self._forks += 1
        name = name or f"fork{self._forks}"
        kept = checkpoint or self.checkpoint(f"for {name}")
        try:
            run = self._run.fork(kept, name)
        finally:
            if checkpoint is None:
                kept.forget()
        return World(run, run.logger, name)

    def fork_map(
        self,
        functions: Sequence[Callable[[World], T]],
        *,
        jobs: int | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> list[T]:
        """Call each function with a world of its own, all from the same state; return the results.

            def upgrade(world):
                world.server.succeed("upgrade")

            def downgrade(world):
                world.server.succeed("downgrade")

            driver.fork_map([upgrade, downgrade])

        At most `jobs` run at the same time, by default one for each processor. All are called,
        whatever becomes of others; then, if some have failed, raises an ExceptionGroup of what they
        raised.
        """
        import os
        from concurrent.futures import ThreadPoolExecutor

        if jobs is not None and jobs < 1:
            raise ValueError(f"fork_map: jobs is {jobs}; allowed is 1 and above")
        own = None if checkpoint else self.checkpoint("for fork_map()")
        worlds: list[World] = []
        stopped = False

        def call(place: int, function: Callable[[World], T]) -> T:
            name = getattr(function, "__name__", "")
            name = f"{place}-{name}" if name.isidentifier() else str(place)
            if stopped:
                raise RuntimeError("fork_map() was interrupted")
            with self.fork(checkpoint or own, name) as world:
                worlds.append(world)
                try:
                    return function(world)
                except Exception as error:
                    error.add_note(f"in the fork {name}")
                    raise

        try:
            with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
                calls = [pool.submit(call, *pair) for pair in enumerate(functions, 1)]
                try:
                    errors = [error for made in calls if (error := made.exception())]
                except BaseException:
                    # A signal. What waits for guests ends with them.
                    stopped = True
                    for world in worlds:
                        world.close()
                    raise
        finally:
            if own:
                own.forget()
        failed = [error for error in errors if isinstance(error, Exception)]
        if failed:
            raise ExceptionGroup(f"{len(failed)} of {len(calls)} functions failed", failed)
        return [made.result() for made in calls]

    def close(self) -> None:
        """End all machines and remove their state, unless it is kept."""
        self._run.close()

    def __enter__(self) -> Self:
        """Give this."""
        return self

    def __exit__(self, *_exc: Any) -> None:
        """End it."""
        self.close()

    def __repr__(self) -> str:
        """Name it."""
        return f"<world {self.name or 'of the test'}>"
