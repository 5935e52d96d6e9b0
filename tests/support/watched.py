"""The command in a process of its own, whose files, sockets and children are noted as they appear."""

import json
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

WATCH = """
import json, os, sys
log = os.open(os.environ["HEREDITY_TEST_EVENTS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
MAKES = {"open", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate"}
CHILDREN = ("subprocess.", "os.system", "os.posix_spawn", "os.exec", "os.fork")
WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

def watch(event, args):
    if event.startswith(("socket.", *CHILDREN)):
        detail = repr(args)[:200]
    elif event in MAKES and isinstance(args[0], (str, bytes)) and not (event == "open" and not args[2] & WRITE):
        made = args[1] if event in ("os.rename", "os.link", "os.symlink") else args[0]
        detail = os.path.abspath(os.fsdecode(made))
    else:
        return
    os.write(log, json.dumps([event, detail]).encode() + b"\\n")

sys.addaudithook(watch)
"""


@dataclass(frozen=True)
class Ran:
    """One finished command, and what it did to the world: ``(event, path)`` of files written, sockets, children."""

    code: int
    stdout: str
    stderr: str
    events: tuple[tuple[str, str], ...]


class Shell:
    """The installed command (or another program) as a user starts it, in a home of its own, watched by audit hooks."""

    def __init__(self, folder: Path) -> None:
        self.home, self.cache, self.temporary = folder / "home", folder / "cache", folder / "tmp"
        self.cwd, self._hook = folder / "cwd", folder / "hook"
        for made in (self.home, self.cache, self.temporary, self.cwd, self._hook):
            made.mkdir()
        (self._hook / "sitecustomize.py").write_text(WATCH)

    def start(self, *command: str | Path, **options: Any) -> tuple["Popen[str]", Path]:
        """``heredity`` with arguments, or another program where the first one is a path; and its events as a file."""
        if not isinstance(command[0], Path):
            command = (Path(sysconfig.get_path("scripts"), "heredity"), *command)
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
        events = self._hook / f"{len(list(self._hook.iterdir()))}.events"
        env = kept | {
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.cache),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(self._hook),
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "HEREDITY_TEST_EVENTS": str(events),
        }
        pipes = {"stdout": PIPE, "stderr": PIPE} | options
        return Popen(command, env=env, cwd=self.cwd, text=True, **pipes), events

    def __call__(self, *command: str | Path, **options: Any) -> Ran:
        """:meth:`start`, and wait."""
        process, events = self.start(*command, **options)
        stdout, stderr = process.communicate(timeout=600)
        seen = [tuple(json.loads(line)) for line in events.read_text().splitlines()]
        return Ran(process.returncode, stdout or "", stderr or "", tuple(dict.fromkeys(seen)))
