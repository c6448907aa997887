# SPDX-License-Identifier: Apache-2.0
"""All forms of harness in a real guest, and what hostile ones leave of it."""

from __future__ import annotations

import contextlib
import py_compile
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.errors import GuestResetError
from bridge.fuzz.files_text import to_bytes
from bridge.fuzz.harness import Harness
from bridge.fuzz.lane import Execution, Lane
from bridge.guest.guest import CommandResult
from bridge.session.session import Session
from bridge.util.resources import guest_directory
from tests.support.guests import complaints
from tests.support.programs import guest_program

pytestmark = [pytest.mark.vm, pytest.mark.guest(target="none", source="kernel")]

HERE = Path(__file__).parent
SECONDS = 60
"""For a case that ends: far more than it needs, also on a busy machine."""
SIGABRT, SIGKILL = 6, 9


class Running:
    """A runner with a harness in a guest; the guest is reset at its end."""

    def __init__(self, session: Session, harness: Harness) -> None:
        self.session = session
        self.ended: CommandResult | None = None
        self._areas = session.open_lane(Lane.sizes(4, 1 << 15))
        self._lane = Lane(self._areas)
        self._lane.prepare()
        for file in harness.files:
            session.guest.run(["mkdir", "-p", Path(file.guest_path).parent], check=True)
            session.put(file.source, file.guest_path, file.mode)
        self._command = [harness.runner, hex(self._lane.number), *harness.arguments]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        end = time.monotonic() + SECONDS
        while not self._lane.ready and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.005)

    def _run(self) -> None:
        with contextlib.suppress(GuestResetError):
            self.ended = self.session.guest.run(self._command)

    def execute(self, case: bytes, timeout: float = SECONDS) -> Execution:
        assert self._lane.ready, self.ended.stderr.decode() if self.ended else "no answer"
        return self._lane.execute(case, timeout)

    def close(self) -> None:
        self.session.reset()
        self._thread.join()
        self._lane.close()
        self.session.close_lane(self._areas)


@contextlib.contextmanager
def running(session: Session, harness: Harness) -> Iterator[Running]:
    runner = Running(session, harness)
    try:
        yield runner
    finally:
        runner.close()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    path = tmp_path_factory.mktemp("hostile") / "hostile.so"
    path.write_bytes(guest_program(HERE / "hostile.c", flags=flags).read_bytes())
    return path


def test_files_calls_are_traced_in_threads_of_their_own(session: Session) -> None:
    with running(session, Harness.parse("files", directory="/dev/shm")) as runner:
        # The first case also has what the kernel does for the first time.
        runner.execute(b"")
        empty = runner.execute(b"")
        alone = runner.execute(to_bytes("open f0 a rw|creat 0644\nwrite f0 100 7\n"))
        case = to_bytes("parallel\n0: stat a\n1: mkdir d 0755\n3: list .\njoin\n")
        together = runner.execute(case)
        assert {x.status for x in (empty, alone, together)} == {0}
        assert len(alone.pcs[0]) > len(empty.pcs[0]) + 200
        # The workers' areas; the second one had nothing to do but live.
        assert len(together.pcs) == 4
        assert min(len(together.pcs[1]), len(together.pcs[3])) > 100
        # The next case finds nothing of it.
        assert runner.execute(case).status == 0
        assert session.run("find /dev/shm -mindepth 2").text == ""


def test_files_difference_to_the_local_side_is_a_case_that_went_wrong(session: Session) -> None:
    session.guest.run("mkdir /mnt/small && mount -t tmpfs -o size=8k t /mnt/small", check=True)
    harness = Harness.parse("files", directory="/mnt/small", differential=True)
    with running(session, harness) as runner:
        done = runner.execute(to_bytes("open f0 a rw|creat 0644\nwrite f0 65535 1\n"))
        assert done.status == SIGABRT
        assert done.output.startswith(b"difference in write.result: call 2: write f0 65535 1\n")
        assert runner.execute(to_bytes("open f0 a rw|creat 0644\nwrite f0 100 1\n")).status == 0


HOSTILE = {
    b"a": SIGABRT,
    b"e": 3 << 8,
    b"_": 4 << 8,
    b"D": 0,
    b"k": 0,
    b"K": 0,
    b"s": 0,
    b"f": 0,
    b"d": 0,
    b"R": 0,
    b"l": 0,
    b"F": 5 << 8,
    b"m": SIGKILL,
}
"""Status of each case of hostile.c that ends."""


def test_hostile_cases_have_a_status_and_the_next_one_works(
    session: Session, hostile: Path
) -> None:
    with running(session, Harness.parse(str(hostile))) as runner:
        # Without file and room of a case before, and traced.
        before = session.run("ls -R /var/lib /root | cksum").text
        for case, status in HOSTILE.items():
            done = runner.execute(case)
            assert (case, done.status) == (case, status)
            if case == b"a":
                assert done.output == b"assertion of the harness\n"
            for _ in range(2):
                assert (case, runner.execute(b"i").status) == (case, 0)
            covered = runner.execute(b"c")
            assert (case, covered.status, bool(covered.pcs[0])) == (case, 0, True)
        assert session.run("pgrep -c kcov-runner").text.strip() == "3"
        assert session.run("ls -R /var/lib /root | cksum").text == before
        assert complaints(session) == ""


def test_hostile_case_that_never_ends_has_no_status_and_a_reset_helps(
    session: Session, hostile: Path
) -> None:
    for _ in range(2):
        with running(session, Harness.parse(str(hostile))) as runner:
            assert runner.execute(b"i").status == 0
            assert runner.execute(b"h", 0.5).status is None


def test_archive_is_linked_with_the_runner(session: Session, tmp_path: Path) -> None:
    source, archive = HERE / "hostile.c", tmp_path / "hostile.a"
    subprocess.run(["cc", "-O2", "-c", source, "-o", tmp_path / "hostile.o"], check=True)
    subprocess.run(["ar", "rcs", archive, tmp_path / "hostile.o"], check=True)
    with running(session, Harness.parse(str(archive))) as runner:
        assert runner.execute(b"c").pcs[0]
        assert runner.execute(b"a").status == SIGABRT
        assert runner.execute(b"c").status == 0


def test_command_has_the_case_on_its_standard_input(session: Session) -> None:
    with running(session, Harness.parse(None, ["sh"])) as runner:
        done = runner.execute(b"cat /proc/version; echo $((6 * 7)) >&2; kill -KILL $$")
        assert (done.status, done.output.splitlines()[-1]) == (SIGKILL, b"42")
        # The shell's own calls are in the second area; the first has fork and wait.
        assert len(done.pcs[1]) > 1000
        assert runner.execute(b"exit 7").status == 0
        assert runner.execute(b"sleep 1000 & setsid sleep 1000 & touch /tmp/x").status == 0
        assert session.run("pgrep -c sleep").text.strip() == "0"
        assert runner.execute(b"test -z $(ls -A /tmp) || kill -SEGV $$").status == 0


def test_command_has_the_case_in_a_file(session: Session) -> None:
    harness = Harness.parse(None, ["grep", "-q", "word", "@@"], exit_status=True)
    with running(session, harness) as runner:
        assert runner.execute(b"a word").status == 0
        assert runner.execute(b"another").status == 1 << 8
        assert runner.execute(b"word\n" * 1000).status == 0


def test_command_that_is_not_there_ends_the_runner(session: Session) -> None:
    with running(session, Harness.parse(None, ["no-such-program", "@@"])) as runner:
        assert runner.ended is not None
        assert b"no-such-program" in runner.ended.stderr


def put_python(session: Session, directory: Path) -> None:
    """Give the guest this Python, which its image lacks: program, libraries, and the modules that
    the harness's program imports."""
    agent = guest_directory() / "agent"
    code = (
        f"import sys; sys.path.insert(0, {str(agent)!r}); sys.dont_write_bytecode = True\n"
        "import encodings.ascii, harness_python, linecache, zipimport\n"
        "for m in sorted(set(getattr(m, '__file__', None) or '' for m in sys.modules.values())):\n"
        " print(m)"
    )
    program = Path(sys.executable).resolve()
    run = subprocess.run([program, "-I", "-c", code], check=True, capture_output=True, text=True)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    library = next(Path(p) for p in sys.path if p.endswith(f"/{version}"))
    archive = directory / "modules.zip"
    session.guest.run(["mkdir", "-p", f"/opt/py/lib/{version}/lib-dynload", "/opt/py/bin"])
    with zipfile.ZipFile(archive, "w") as out:
        for line in filter(None, run.stdout.splitlines()):
            path = Path(line)
            if path.suffix == ".py" and path.is_relative_to(library):
                # Compiled here: in the guest it takes a minute.
                compiled = directory / "compiled.pyc"
                py_compile.compile(str(path), str(compiled), doraise=True)
                out.write(compiled, path.relative_to(library).with_suffix(".pyc"))
            elif path.suffix == ".so":
                session.put(path, f"/opt/py/lib/{version}/lib-dynload/{path.name}", 0o755)
    session.put(archive, f"/opt/py/lib/{version.replace('.', '')}.zip")
    session.put(program, "/opt/py/bin/python3", 0o755)
    for line in subprocess.run(
        ["ldd", program], check=True, capture_output=True, text=True
    ).stdout.splitlines():
        words = line.split()
        if len(words) > 2 and not words[0].startswith(("libc.", "libm.", "libdl.", "libpthread.")):
            session.put(Path(words[2]), f"/opt/py/lib/{words[0]}", 0o755)
    wrapper = (
        "#!/bin/sh\nexport PYTHONHOME=/opt/py LD_LIBRARY_PATH=/opt/py/lib\n"
        'exec /opt/py/bin/python3 "$@"\n'
    )
    session.put(wrapper.encode(), "/usr/bin/python3", 0o755)
    started = session.run(["python3", "-c", ""])
    if b"GLIBC_" in started.stderr:
        pytest.skip("this machine's Python needs a newer C library than the guest has")
    assert started.exit_status == 0, started.stderr.decode()


def test_python_function_keeps_one_interpreter(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parser.py").write_text(
        "import os\nimport sys\nseen = []\n"
        "def parse(data):\n"
        "    seen.append(data)\n"
        "    if data == b'raise': raise ValueError('not a case')\n"
        "    if data == b'exit': sys.exit(3)\n"
        "    if data == b'count': raise KeyError(len(seen))\n"
        "    if data == b'die': os._exit(5)\n"
        "    os.stat('/')\n"
    )
    harness = Harness.parse("python:parser:parse")
    put_python(session, tmp_path)
    with running(session, harness) as runner:
        done = runner.execute(b"fine")
        assert done.status == 0, done.output
        assert len(done.pcs[1]) > 50
        raised = runner.execute(b"raise")
        assert raised.status == SIGABRT
        assert raised.output.endswith(b"ValueError: not a case\n")
        assert runner.execute(b"exit").output.endswith(b"SystemExit: 3\n")
        # The fourth case of the same process, then the first one of another.
        assert runner.execute(b"count").output.endswith(b"KeyError: 4\n")
        assert runner.execute(b"die").status == 5 << 8
        assert runner.execute(b"count").output.endswith(b"KeyError: 1\n")
