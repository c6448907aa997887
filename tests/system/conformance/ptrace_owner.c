// SPDX-License-Identifier: Apache-2.0
/* An owner under ptrace: its calls, its area as the tracer reads it, calls the tracer changes. */
#include "kcov_test.h"

#include <sys/ptrace.h>
#include <sys/user.h>

static struct kcov kcov;

static void tracee(void)
{
	if (ptrace(PTRACE_TRACEME, 0, 0, 0) || kcov_enable(&kcov))
		_exit(1);
	raise(SIGSTOP);
	reset(&kcov);
	call();
	syscall(SYS_getuid);
	if (syscall(SYS_getgid) != 4711)
		_exit(2);
	if (!traces(&kcov))
		_exit(3);
	_exit(0);
}

static void go(pid_t pid)
{
	int status;

	if (ptrace(PTRACE_SYSCALL, pid, 0, 0))
		bail("PTRACE_SYSCALL");
	if (waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status))
		bail("the tracee did not stop");
}

static struct user_regs_struct regs_of(pid_t pid)
{
	struct user_regs_struct regs;

	if (ptrace(PTRACE_GETREGS, pid, 0, &regs))
		bail("PTRACE_GETREGS");
	return regs;
}

static long peek(pid_t pid, void *at)
{
	long word;

	errno = 0;
	word = ptrace(PTRACE_PEEKDATA, pid, at, 0);
	if (errno)
		printf("# PTRACE_PEEKDATA: %s\n", strerror(errno));
	return word;
}

int main(int argc, char **argv)
{
	struct user_regs_struct regs;
	long before, after;
	int status;
	pid_t pid;

	begin(argc, argv);
	kcov = kcov_new(WORDS);
	pid = child();
	if (!pid)
		tracee();
	if (waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status))
		bail("the tracee did not stop");
	do {
		go(pid);
	} while ((long)regs_of(pid).orig_rax != SYS_getppid);
	before = peek(pid, &kcov.area[0]);
	go(pid);
	after = peek(pid, &kcov.area[0]);
	ok(before >= 0 && after > before, "a call's PCs are there at the stop after it");
	is(after, (long)count(&kcov), "PEEKDATA reads what the mapping shows");
	ok((unsigned long)peek(pid, &kcov.area[1]) == kcov.area[1], "the first PC too");
	is(ptrace(PTRACE_POKEDATA, pid, &kcov.area[0], 0), 0, "POKEDATA of word 0");
	is(count(&kcov), 0, "is seen in the mapping");

	go(pid);
	regs = regs_of(pid);
	is(regs.orig_rax, SYS_getuid, "the next call begins");
	regs.orig_rax = -1;
	is(ptrace(PTRACE_SETREGS, pid, 0, &regs), 0, "the tracer takes it away");
	go(pid);
	ok(1, "which is survived");

	go(pid);
	is(regs_of(pid).orig_rax, SYS_getgid, "the next call begins");
	go(pid);
	regs = regs_of(pid);
	regs.rax = 4711;
	is(ptrace(PTRACE_SETREGS, pid, 0, &regs), 0, "the tracer changes its result");
	is(ptrace(PTRACE_DETACH, pid, 0, 0), 0, "and lets go");
	is(wait_for(pid), 0, "the owner goes on, traced");

	pid = child();
	if (!pid)
		tracee();
	waitpid(pid, &status, 0);
	go(pid);
	kill(pid, SIGKILL);
	is(wait_for(pid), -SIGKILL, "an owner that is killed at a stop");
	is(kcov_enable(&kcov), 0, "frees its instance");
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov_free(&kcov);
	return end();
}
