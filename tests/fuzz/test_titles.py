# SPDX-License-Identifier: Apache-2.0
"""Titles of faults, from what real kernels and real Python programs write about them."""

from __future__ import annotations

import faulthandler
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.fuzz.slot_events import Evidence, Suspect
from bridge.fuzz.titles import (
    STACK_FRAMES,
    Fault,
    Kind,
    faults_of,
    hang_fault,
    harness_fault,
    kernel_faults,
    memory_problem,
    target_fault,
    without_numbers,
)
from bridge.targets.faults import TargetFaults, stacks_of

CONSOLES = Path(__file__).resolve().parents[1] / "data" / "consoles"
OURS = " [kernel_faults]"

TITLES = {
    "address": f"BUG: unable to handle page fault for address: ADDRESS in fault_address{OURS}",
    "atomic": f"BUG: scheduling while atomic: sh/N/ADDRESS in fault_atomic{OURS}",
    "bug": "kernel BUG at /work/kernel_faults.c:29!",
    "divide": f"divide error in fault_divide{OURS}",
    "double_free": "kernel BUG at mm/slub.c:419!",
    "execute": f"BUG: kernel NULL pointer dereference in provoke{OURS}",
    "hang": f"INFO: task sh:N blocked for more than N seconds in fault_hang{OURS}",
    "kasan_null": f"BUG: KASAN: null-ptr-deref in fault_null{OURS}",
    "kasan_out_of_bounds": f"BUG: KASAN: slab-out-of-bounds in fault_out_of_bounds{OURS}",
    "kasan_use_after_free": f"BUG: KASAN: use-after-free in fault_use_after_free{OURS}",
    "kasan_wild": f"BUG: KASAN: wild-memory-access in fault_non_canonical{OURS}",
    "list": "kernel BUG at lib/list_debug.c:33!",
    "non_canonical": "general protection fault, maybe for address ADDRESS in "
    f"fault_non_canonical{OURS}",
    "null": f"BUG: kernel NULL pointer dereference in fault_null{OURS}",
    "panic": "Kernel panic - not syncing: kernel_faults: all is lost after N steps in "
    f"fault_panic{OURS}",
    "rcu_stall": f"rcu: INFO: rcu_preempt detected stalls on CPUs/tasks in fault_rcu_stall{OURS}",
    "refcount": f"refcount_t: addition on N; use-after-free in fault_refcount{OURS}",
    "sleep_in_atomic": "BUG: sleeping function called from invalid context at "
    "/tmp/kernel_faults/kernel_faults.c:267",
    "soft_lockup": "watchdog: BUG: soft lockup - CPU#N stuck for Ns! [sh:N] in "
    f"fault_soft_lockup{OURS}",
    "stack": "BUG: TASK stack guard page was hit at ADDRESS (stack is ADDRESS..ADDRESS) in "
    f"fault_stack{OURS}",
    "sysrq": "Kernel panic - not syncing: sysrq triggered crash in sysrq_handle_crash",
    "ubsan_index": "UBSAN: array-index-out-of-bounds in /tmp/kernel_faults/kernel_faults.c:200:14",
    "ubsan_shift": "UBSAN: shift-out-of-bounds in /tmp/kernel_faults/kernel_faults.c:192:11",
    "usercopy": "WARNING at mm/maccess.c:228 __copy_overflow",
    "warn": f"WARNING at /work/kernel_faults.c:35 fault_warn{OURS}",
    "warn_text": f"WARNING at /work/kernel_faults.c:41 fault_warn_text{OURS}",
    "write_null": f"BUG: kernel NULL pointer dereference in fault_write_null{OURS}",
}
"""The first fault of each report, as ``tests/data/consoles`` has it."""


def console(name: str) -> str:
    return (CONSOLES / f"{name}.txt").read_text()


def test_titles_of_all_reports_that_there_are() -> None:
    found = {path.stem: kernel_faults(path.read_text())[0] for path in CONSOLES.glob("*.txt")}
    assert {name: fault.title for name, fault in found.items()} == TITLES
    for name, fault in found.items():
        assert fault.kind is Kind.KERNEL
        assert fault.text.partition("\n")[0] in console(name), name
    # Faults in the module are told apart by what led there, also where the title is another's.
    other = {
        "execute": "provoke",
        "sysrq": "sysrq_handle_crash",
        "kasan_wild": "fault_non_canonical",
    }
    for name, fault in found.items():
        function = "fault_" + re.sub("^(?:kasan|ubsan)_", "", name)
        assert other.get(name, function) in fault.stack[:2], name
    assert found["sysrq"].stack[:2] == ("sysrq_handle_crash", "__handle_sysrq")
    assert len({fault.key for fault in found.values()}) == len(TITLES)


@pytest.mark.parametrize("name", ["null", "divide", "bug", "refcount", "stack"])
def test_kernel_faults_of_an_oops_is_one_with_all_that_follows(name: str) -> None:
    (fault,) = kernel_faults(console(name))
    assert "Call Trace:" in fault.text
    assert len(fault.stack) == STACK_FRAMES


def changed(report: str) -> str:
    """The same report of another time: other addresses, offsets, processes, processors."""
    report = re.sub(r"\[ *\d+\.\d+\]", "[  999.123456]", report)
    report = re.sub(r"\b[0-9a-f]{16}\b", "ffff8880deadbee8", report)
    report = re.sub(r"\+0x[0-9a-f]+/0x", "+0x1f0/0x", report)
    report = re.sub(r"\bPID: \d+", "PID: 31337", report)
    report = re.sub(r"\bsh:\d+\b", "sh:31337", report)
    report = re.sub(r"\bsh/\d+/", "sh/31337/", report)
    report = re.sub(r"\bCPU(: |#)\d+", r"CPU\g<1>3", report)
    report = re.sub(r"more than \d+ sec", "more than 122 sec", report)
    report = re.sub(r"after \d+ steps", "after 31337 steps", report)
    return re.sub(r"stuck for \d+s", "stuck for 266s", report)


@pytest.mark.parametrize("name", sorted(TITLES))
def test_kernel_faults_of_another_time_are_equal(name: str) -> None:
    report = console(name)
    assert changed(report) != report
    assert kernel_faults(changed(report))[0] == kernel_faults(report)[0]
    # As the kernel's log has it, with CONFIG_PRINTK_CALLER, and over a serial line.
    with_level = "".join(f"<4>{line}\n" for line in report.splitlines())
    with_caller = re.sub(r"^(\[ *\d+\.\d+\])", r"\1[   T94]", report, flags=re.MULTILINE)
    for other in (with_level, with_caller, report.replace("\n", "\r\n")):
        assert kernel_faults(other)[0] == kernel_faults(report)[0]


def test_kernel_faults_of_two_reports_are_in_order() -> None:
    titles = [fault.title for fault in kernel_faults(console("warn") + console("null"))]
    assert titles == [TITLES["warn"], TITLES["null"]]


def test_kernel_faults_that_come_after_one_another_in_one_are_those_of_the_first() -> None:
    # kernel/panic.c, oops_end(): panic("Fatal exception") after an oops, with panic_on_oops.
    report = console("null") + "[    9.0] Kernel panic - not syncing: Fatal exception\n"
    assert [fault.title for fault in kernel_faults(report)] == [TITLES["null"]]


@pytest.mark.parametrize(
    "line",
    [
        "a.out[99]: segfault at 0 ip 0000 sp 0000 error 4 in a.out",
        "traps: a.out[99] trap divide error ip:1 sp:2 error:0 in a.out",
        "eth0: link up",
        "",
    ],
)
def test_kernel_faults_of_programs_and_others_are_none(line: str) -> None:
    assert kernel_faults(f"[    1.0] {line}") == []


# Format strings of Linux 6.1 with values in them, where no guest of the tests has the feature.
@pytest.mark.parametrize(
    ("report", "title"),
    [
        # kernel/kcsan/report.c, print_report(): "BUG: KCSAN: %s in %ps / %ps\n"
        (
            "BUG: KCSAN: data-race in p9_read / p9_write",
            "BUG: KCSAN: data-race in p9_read / p9_write",
        ),
        # mm/kfence/report.c, kfence_report_error(): "BUG: KFENCE: use-after-free %s in %pS\n\n"
        (
            "BUG: KFENCE: use-after-free read in p9_read+0x10/0x20",
            "BUG: KFENCE: use-after-free read in p9_read",
        ),
    ],
)
def test_kernel_faults_of_other_features_keep_the_kernels_words(report: str, title: str) -> None:
    (fault,) = kernel_faults("".join(f"[   12.345678] {line}\n" for line in report.splitlines()))
    assert fault.title == title


def test_without_numbers_keeps_names_and_places() -> None:
    line = "do_syscall_64 9p ext4 lib/x.c:25:3 at 0x1f, ffff888004a3a478, 77 of 3s, kworker/0:1"
    expected = "do_syscall_64 9p ext4 lib/x.c:25:3 at ADDRESS, ADDRESS, N of Ns, kworker/N:N"
    assert without_numbers(line) == expected


# ---- the target


def in_thread(work: Callable[[], object]) -> str:
    """What is noted of a thread that raises."""
    faults = TargetFaults()
    faults.watch()
    try:
        thread = threading.Thread(target=work, name="Thread-7 (serve)")
        # Else it is on stderr.
        threading.excepthook, kept = faults._note, threading.excepthook
        faults._before = lambda args: None
        thread.start()
        thread.join()
        threading.excepthook = kept
        (problem,) = faults.take()
    finally:
        faults.close()
    return problem


def raise_in_library() -> None:
    tempfile.TemporaryDirectory(dir="/nonexistent")


def raise_assertion() -> None:
    number = time.time()
    assert number < 0, f"{number} is too large"


def raise_from_another() -> None:
    try:
        raise_assertion()
    except AssertionError as error:
        raise_value(error)


def raise_value(error: Exception) -> None:
    raise ValueError("12:30: odd") from error


def raise_group() -> None:
    raise ExceptionGroup("several", [ValueError("a"), KeyError("b")])


@pytest.mark.parametrize(
    ("work", "title"),
    [
        (raise_assertion, "AssertionError in raise_assertion (fuzz/test_titles.py)"),
        (raise_in_library, "FileNotFoundError in raise_in_library (fuzz/test_titles.py)"),
        (raise_from_another, "ValueError in raise_value (fuzz/test_titles.py)"),
        (raise_group, "ExceptionGroup in raise_group (fuzz/test_titles.py)"),
    ],
)
def test_target_fault_of_an_exception_is_its_type_and_the_targets_function(
    work: Callable[[], object], title: str
) -> None:
    problem = in_thread(work)
    fault = target_fault(problem, ("tests.fuzz.test_titles",))
    assert (fault.kind, fault.title) == (Kind.TARGET_EXCEPTION, title)
    assert fault.text == problem
    assert fault == target_fault(in_thread(work), ("tests.fuzz.test_titles",))


def test_target_fault_without_known_packages_names_the_innermost_function() -> None:
    fault = target_fault(in_thread(raise_in_library))
    assert fault.title == "FileNotFoundError in mkdtemp (python3.11/tempfile.py)".replace(
        "python3.11", f"python3.{sys.version_info.minor}"
    )
    assert "raise_in_library (fuzz/test_titles.py)" in fault.stack


def test_target_fault_of_a_process_that_died_has_how_and_where() -> None:
    program = (
        "import faulthandler, os\nfaulthandler.enable()\n"
        "def dies(): os.kill(os.getpid(), 11)\ndies()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGSEGV
    problem = f"the process of the target x was killed by SIGSEGV\n{done.stderr}"
    fault = target_fault(problem)
    assert fault.kind is Kind.TARGET_DEATH
    assert re.sub(r"\(.*\)", "()", fault.title) == (
        "the process of the target x was killed by SIGSEGV in dies ()"
    )


@pytest.mark.parametrize(
    ("problem", "kind", "title"),
    [
        (
            "the thread Thread-12 (serve), which serves the guest, has ended",
            Kind.TARGET_DEATH,
            "the thread Thread-N (serve), which serves the guest, has ended",
        ),
        (
            "the process of the target plan9 exited with 3",
            Kind.TARGET_DEATH,
            "the process of the target plan9 exited with N",
        ),
        (
            "the target no longer listens on its endpoint 9p",
            Kind.TARGET_DEATH,
            "the target no longer listens on its endpoint 9p",
        ),
        (
            "the target x did not answer within 5 s (problems)",
            Kind.TARGET_HANG,
            "the target does not answer",
        ),
        (
            memory_problem(512, "thread x:\n"),
            Kind.TARGET_MEMORY,
            "the target takes more memory than 512 MiB",
        ),
        (
            "asyncio on the thread Thread-9: Task exception was never retrieved\n",
            Kind.TARGET_EXCEPTION,
            "asyncio on the thread Thread-N: Task exception was never retrieved",
        ),
    ],
)
def test_target_fault_of_a_problem_without_a_traceback(
    problem: str, kind: Kind, title: str
) -> None:
    fault = target_fault(problem)
    assert (fault.kind, fault.title) == (kind, title)


# ---- hangs


def spin(stop: threading.Event) -> None:
    while not stop.is_set():
        sum(range(1_000_000))  # long, so that a sample of the stack is hardly of is_set()


def sleep_with_lock(stop: threading.Event) -> None:
    while not stop.is_set():
        time.sleep(0.05)


def serve(stop: threading.Event) -> None:
    import socket

    one, two = socket.socketpair()
    with one, two:
        one.settimeout(0.2)
        while not stop.is_set():
            try:
                one.recv(1)
            except TimeoutError:
                continue


def stacks_while(work: Callable[[threading.Event], None]) -> str:
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,), name="serving")
    thread.start()
    time.sleep(0.05)
    try:
        return stacks_of([thread])
    finally:
        stop.set()
        thread.join()


PROCESSES = """\
1 S init_wait: /init
    [<0>] do_epoll_wait+0x6bb/0x7c0
97 D p9_client_rpc: /usr/bin/kcov-runner 1 files
    [<0>] p9_client_rpc+0x1d8/0x460 [9pnet]
    [<0>] p9_client_walk+0x98/0x270 [9pnet]
"""
"""As bridge.session.evidence.PROCESSES prints it, from /proc/PID/stack of a guest."""


@pytest.mark.parametrize("work", [spin, sleep_with_lock])
def test_hang_fault_target_in_its_own_code_is_to_blame(
    work: Callable[[threading.Event], None],
) -> None:
    fault = hang_fault(PROCESSES, stacks_while(work), ("tests.fuzz",))
    assert fault.kind is Kind.TARGET_HANG
    assert fault.title == f"the target hangs in {work.__name__} (fuzz/test_titles.py)"


def test_hang_fault_target_that_goes_on_is_not_to_blame() -> None:
    first = stacks_while(spin)
    for later, kind in (
        (first, Kind.TARGET_HANG),
        (stacks_while(sleep_with_lock), Kind.TIME_OUT),
        (stacks_while(serve), Kind.TIME_OUT),
        ("", Kind.TIME_OUT),
    ):
        assert hang_fault(PROCESSES, first, ("tests.fuzz",), later=later).kind is kind
        evidence = Evidence(stacks=first, later=later)
        suspect = Suspect(b"", None, timed_out=True, evidence=evidence)
        assert faults_of(suspect, ("tests.fuzz",))[0].kind is kind


def test_hang_fault_target_that_waits_for_a_request_is_not_to_blame() -> None:
    fault = hang_fault(PROCESSES, stacks_while(serve), ("tests.fuzz",))
    assert fault.kind is Kind.TIME_OUT
    assert fault.title == "the case did not end in time: the harness waits in p9_client_rpc"
    assert fault.stack == ("p9_client_rpc", "p9_client_walk")
    assert hang_fault("", "").title == "the case did not end in time"


def test_hang_fault_of_faulthandlers_text_has_the_innermost_function_too() -> None:
    # Of a forked target that was ended because it did not answer.
    stop = threading.Event()
    thread = threading.Thread(target=spin, args=(stop,))
    thread.start()
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            text = file.read().decode()
    finally:
        stop.set()
        thread.join()
    problem = f"the target x did not answer within 5 s (problems)\n{text}"
    # The main thread is in a function of this module, too.
    titles = {
        hang_fault("", part, ("tests.fuzz",)).title
        for part in re.split(r"(?m)^(?=Thread|Current)", text)
    }
    assert "the target hangs in spin (fuzz/test_titles.py)" in titles
    assert target_fault(problem, ("tests.fuzz",)).kind is Kind.TARGET_HANG


# ---- the harness


def compiled(tmp_path: Path, text: str, *flags: str) -> tuple[int, bytes]:
    source, program = tmp_path / "it.c", tmp_path / "it"
    source.write_text(text)
    subprocess.run(["gcc", "-g", "-w", *flags, "-o", program, source], check=True)
    done = subprocess.run([program], capture_output=True)
    status = -done.returncode if done.returncode < 0 else done.returncode << 8
    return status, done.stderr


def test_harness_fault_of_a_signal_and_an_assertion(tmp_path: Path) -> None:
    text = "#include <assert.h>\nint step(int x) { assert(x > 0); return x; }\n"
    fault = harness_fault(*compiled(tmp_path, f"{text}int main(void) {{ return step(0); }}\n"))
    assert fault is not None
    assert fault.title == "the harness was killed by SIGABRT: Assertion `x > N' failed. in step"
    plain = harness_fault(*compiled(tmp_path, "int main(void) { return *(volatile int *)0; }\n"))
    assert plain == Fault(Kind.HARNESS, "the harness was killed by SIGSEGV")
    assert harness_fault(0, b"") is None
    exited = harness_fault(3 << 8, b"")
    assert exited is not None
    assert exited.title == "the harness exited with 3"


def test_harness_fault_of_a_sanitizer_is_in_its_words(tmp_path: Path) -> None:
    text = """
        #include <stdlib.h>
        int look(char *x) { return x[8]; }
        int main(void) { char *x = malloc(8); return look(x) & 0; }
        """
    first = harness_fault(*compiled(tmp_path, text, "-fsanitize=address"))
    assert first is not None
    assert first.title == "AddressSanitizer: heap-buffer-overflow in look"
    assert first.stack[:2] == ("look", "main")
    undefined = "int main(int n, char **v) { return (1 << (n + 40)) & 0; }\n"
    flags = ("-fsanitize=undefined", "-fno-sanitize-recover")
    second = harness_fault(*compiled(tmp_path, undefined, *flags))
    assert second is not None
    assert "runtime error: shift exponent N is too large" in second.title


def test_harness_fault_of_a_python_function_is_its_exception() -> None:
    try:
        raise_assertion()
    except AssertionError:
        output = traceback.format_exc().encode()
    fault = harness_fault(1 << 8, output)
    assert fault is not None
    assert fault.title == "AssertionError in raise_assertion (fuzz/test_titles.py)"


# ---- a case


def test_faults_of_a_case_the_cause_comes_first() -> None:
    problem = in_thread(raise_assertion)
    suspect = Suspect(
        b"x",
        signal.SIGSEGV,
        timed_out=False,
        evidence=Evidence(
            console=console("null"),
            dmesg=console("null"),
            lost="the guest was reset from inside",
            problems=(problem, problem),
        ),
    )
    assert [fault.kind for fault in faults_of(suspect)] == [
        Kind.KERNEL,
        Kind.TARGET_EXCEPTION,
        Kind.HARNESS,
    ]


def test_faults_of_a_case_with_only_one_sign() -> None:
    def only(suspect: Suspect) -> tuple[Kind, str]:
        (fault,) = faults_of(suspect)
        return fault.kind, fault.title

    lost = Evidence(lost="the guest was reset from inside\nand more")
    assert only(Suspect(b"", None, evidence=lost)) == (
        Kind.GUEST_LOST,
        "the guest was reset from inside",
    )
    log_alone = Evidence(console="nothing", dmesg=console("warn"))
    assert only(Suspect(b"", 0, evidence=log_alone)) == (Kind.KERNEL, TITLES["warn"])
    differs = Suspect(b"", signal.SIGABRT, b"difference in read.value: call 3: 4, not 5\nmore")
    assert only(differs) == (Kind.DIFFERENCE, "difference in read.value")
    hangs = Suspect(b"", None, timed_out=True, evidence=Evidence(stacks=PROCESSES))
    assert only(hangs)[0] is Kind.TIME_OUT
    assert faults_of(Suspect(b"", 0)) == []
