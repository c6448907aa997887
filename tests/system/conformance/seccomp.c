// SPDX-License-Identifier: Apache-2.0
/* System calls that a seccomp filter answers, traps or punishes. */
#include "kcov_test.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>

static struct kcov kcov;
static uint64_t in_handler;

static void on_sigsys(int number)
{
	(void)number;
	in_handler = count(&kcov);
}

/* The process's calls of one number get an answer of the filter's. */
static void filter(int nr, unsigned int answer)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned int)nr, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, answer),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof(code) / sizeof(*code), code };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
	    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		_exit(95);
}

static int with_errno(void)
{
	filter(SYS_getuid, SECCOMP_RET_ERRNO | 33);
	reset(&kcov);
	if (syscall(SYS_getuid) != -1 || errno != 33)
		return 1;
	if (!count(&kcov))
		return 2;
	return traces(&kcov) ? 0 : 3;
}

static int with_trap(void)
{
	signal(SIGSYS, on_sigsys);
	filter(SYS_getuid, SECCOMP_RET_TRAP);
	reset(&kcov);
	syscall(SYS_getuid);
	if (!in_handler)
		return 1;
	return traces(&kcov) ? 0 : 3;
}

static int with_kill(void)
{
	filter(SYS_getuid, SECCOMP_RET_KILL_PROCESS);
	syscall(SYS_getuid);
	return 1;
}

static int strict(void)
{
	uint64_t before;

	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT, 0))
		return 95;
	reset(&kcov);
	before = count(&kcov);
	/* Nothing else is allowed but exit. */
	syscall(SYS_write, 1, "", 0);
	syscall(SYS_exit, count(&kcov) > before ? 0 : 1);
	return 2;
}

static void run(int (*function)(void), int status, const char *what)
{
	pid_t pid = child();

	if (!pid)
		_exit(kcov_enable(&kcov) ? 94 : function());
	is(wait_for(pid), status, what);
	is(kcov_enable(&kcov), 0, "its end frees the instance");
	is(kcov_disable(&kcov), 0, "DISABLE");
	kcov_again(&kcov);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	if (prctl(PR_GET_SECCOMP, 0, 0, 0, 0) < 0) {
		skip("seccomp", "not in this kernel");
		return end();
	}
	kcov = kcov_new(WORDS);
	run(with_errno, 0, "a call that a filter answers with an errno leaves PCs");
	run(with_trap, 0, "a call that a filter traps leaves PCs before the handler runs");
	run(with_kill, -SIGSYS, "a call for which a filter kills");
	run(strict, 0, "strict mode: the calls that are left are traced");
	kcov_free(&kcov);
	return end();
}
