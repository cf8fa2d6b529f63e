"""The lock of a workdir: one training at a time."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from typing import Self

from etils import epath

from diffusion_jax.errors import UserError
from diffusion_jax.running import files, hosts

BEAT = 10  # seconds between two signs of life of a training whose workdir has no file locks
PAUSE = 2  # seconds in which a second newcomer would show
DEAD = 35  # seconds without a sign of life after which such a training has ended


class Lock:
    """Context in which no other training uses a workdir; it creates the folder if it is missing.

    The kernel locks the file, and frees it when the process ends, however it ends. A bucket, and a file system
    without locks, has a lease instead: the holder changes the file every BEAT seconds, and a newcomer takes the
    workdir if the file does not change for DEAD seconds. Process 0 holds the lock for all processes.

    Raises:
      UserError: another training holds the workdir, or the folder cannot be written.
    """

    def __init__(self, folder: epath.Path) -> None:
        self._path = folder / ".training"
        self._descriptor: int | None = None
        self._holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T %Z")}
        self._holder["token"] = secrets.token_hex(8)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._made = self._lost = False

    def __enter__(self) -> Self:
        hosts.on_main(self._take)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()  # before the lock is free: a newcomer locks a file of its own
            os.close(self._descriptor)
        elif self._holder.get("beat") and not self._lost:
            with contextlib.suppress(OSError):
                self._path.unlink()
        if self._made:
            with contextlib.suppress(OSError):  # only an empty folder: the run was refused before it began
                os.rmdir(self._path.parent)

    def check(self) -> None:
        """Raises UserError if another training has taken the workdir from this one, which had given no sign of life."""
        if self._lost:
            raise UserError(f"{self._path.parent} was taken over by another training while this one stood still")

    def _take(self):
        try:
            self._made = not self._path.parent.exists()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if "://" in str(self._path) or not self._lock():
                self._lease()
        except OSError as error:
            raise UserError(f"--workdir={self._path.parent} cannot be written ({error}): give another folder") from None

    def _lock(self):
        """Locks the file. Returns False on a file system without locks."""
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if isinstance(error, BlockingIOError):
                    raise self._taken(self._read()) from None
                return False
            if self._path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                break
            os.close(descriptor)  # its last holder has just removed it
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(self._holder).encode())
        self._descriptor = descriptor
        return True

    def _lease(self):
        """Writes the file, unless somebody else changes it, and keeps changing it in a thread."""
        if before := self._read():
            print(f"waiting {DEAD} s for a sign of life of {_named(before)}")
            end = time.monotonic() + DEAD
            while time.monotonic() < end and (now := self._read()):
                if now != before:
                    raise self._taken(now)
                time.sleep(PAUSE / 2)
        self._beat()
        time.sleep(PAUSE)  # two newcomers: the one that wrote last has the workdir
        if self._read().get("token") != self._holder["token"]:
            raise self._taken(self._read())
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _live(self):
        while not self._ended.wait(BEAT) and not self._lost:
            with contextlib.suppress(OSError):  # the next beat may succeed
                self._live_once()

    def _live_once(self):
        self._lost = self._read().get("token", self._holder["token"]) != self._holder["token"]
        if not self._lost:
            self._beat()

    def _beat(self):
        self._holder["beat"] = self._holder.get("beat", 0) + 1
        files.write_text(self._path, json.dumps(self._holder))

    def _read(self):
        try:
            holder = json.loads(self._path.read_text())
            return holder if isinstance(holder, dict) else {}
        except (OSError, ValueError):
            return {}

    def _taken(self, holder):
        return UserError(
            f"--workdir={self._path.parent} is in use by {_named(holder)}: wait for it, stop it, or give another folder"
        )


def _named(holder):
    if not holder:
        return "another training"
    return f"a training in process {holder.get('process')} on {holder.get('host')} since {holder.get('since')}"
