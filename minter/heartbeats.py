"""Heartbeats: each process tells every few seconds that it runs and what it did, by its own connection."""

import atexit
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress

from minter.database import counts, processes
from minter.database.connection import open_pool
from minter.errors import Unavailable
from minter.service import Service
from minter.tokens.clock import check_clock, new_uuid7

logger = logging.getLogger(__name__)


class Heartbeat:
    """The heartbeat of one process. A thread writes it; `problem` says why the last one failed.

    `counted` returns what the process counted since its start, `facts` what only it knows. Where the answer
    to a heartbeat is lost, its counts are written again with the next one.
    """

    def __init__(
        self,
        role: str,
        service: Service,
        counted: Callable[[], counts.Counts] = dict,
        facts: Callable[[], Mapping[str, object]] = dict,
    ) -> None:
        self._counted, self._facts = counted, facts
        self._written: Counter[tuple[str, str, str]] = Counter()
        self._process = processes.this_process(role, new_uuid7(), service.clock())
        self._clock = service.store.clock
        self._pool = open_pool(service.loaded.dsn, 1, 2)
        self._ended = threading.Event()
        self._one = threading.Lock()
        self.problem: Unavailable | None = None

    def start(self) -> "Heartbeat":
        """Start the thread; the process's row is deleted when the process ends in order."""
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()
        atexit.register(self.stop)
        return self

    def stop(self) -> None:
        """End the thread and delete the row, if Postgres answers."""
        if not self._ended.is_set():
            self._ended.set()
            if self._one.acquire(timeout=processes.LEAVE_SECONDS):  # or a beat would write the row again
                with suppress(Unavailable):
                    processes.leave(self._pool, self._process.process_id)
            self._pool.dispose()

    def beat(self, patience: float = processes.BEAT_SECONDS) -> None:
        """Write the heartbeat now; raises Unavailable, or ClockSkew if the clock is off."""
        if not self._one.acquire(timeout=patience):
            raise self.problem or Unavailable(f"Postgres gives no answer within {patience:g} s")
        try:
            counted = Counter(self._counted())
            new = counted - self._written
            skew = processes.beat(self._pool, self._process, self._clock, patience, self._facts(), new)
            self._written = counted
            check_clock(skew)
        except Unavailable as error:
            self.problem = error
            raise
        finally:
            self._one.release()
        self.problem = None

    def acts(self) -> bool:
        """Say whether this process acts for its role, of which one process acts: the one that started first.

        While Postgres is away, each says so: work of which one does all is safe to do twice.
        """
        try:
            first = processes.longest_running(self._pool, self._process.role, processes.BEAT_SECONDS)
        except Unavailable:
            return True
        return first in (None, self._process.process_id)

    def _run(self) -> None:
        told = ""
        while not self._ended.is_set():
            problem = self._tried()
            if problem != told:
                logger.warning("heartbeat: %s", problem or "well again")
            told = problem
            self._ended.wait(processes.BEAT_SECONDS)

    def _tried(self) -> str:
        try:
            self.beat()
        except Unavailable as error:
            return error.message
        except Exception:
            logger.exception("a heartbeat failed")
        return ""
