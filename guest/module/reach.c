// SPDX-License-Identifier: GPL-2.0
/*
 * What a system call can have to do with a target, as far as that is known when it begins.
 *
 * A call that is not listed is KB_REACH_CALL: a file system asks its server and waits for the
 * answer. What a call does with a socket or a device may reach a target after the call's end, and
 * be answered in a later call of the task.
 */

#include <linux/file.h>
#include <linux/fs.h>
#include <asm/syscall.h>
#include <asm/unistd.h>

#include "kcov_bridge.h"

/* In the table below: depends on the file of the descriptor that is the first argument. */
#define KB_REACH_BY_FILE	(KB_REACH_WORKS + 1)

static const u8 kb_reaches[] = {
	[__NR_alarm]		= KB_REACH_NONE,
	[__NR_arch_prctl]	= KB_REACH_NONE,
	[__NR_capget]		= KB_REACH_NONE,
	[__NR_clock_getres]	= KB_REACH_NONE,
	[__NR_clock_gettime]	= KB_REACH_NONE,
	[__NR_get_robust_list]	= KB_REACH_NONE,
	[__NR_getcpu]		= KB_REACH_NONE,
	[__NR_getegid]		= KB_REACH_NONE,
	[__NR_geteuid]		= KB_REACH_NONE,
	[__NR_getgid]		= KB_REACH_NONE,
	[__NR_getgroups]	= KB_REACH_NONE,
	[__NR_getitimer]	= KB_REACH_NONE,
	[__NR_getpgid]		= KB_REACH_NONE,
	[__NR_getpgrp]		= KB_REACH_NONE,
	[__NR_getpid]		= KB_REACH_NONE,
	[__NR_getppid]		= KB_REACH_NONE,
	[__NR_getpriority]	= KB_REACH_NONE,
	[__NR_getrandom]	= KB_REACH_NONE,
	[__NR_getresgid]	= KB_REACH_NONE,
	[__NR_getresuid]	= KB_REACH_NONE,
	[__NR_getrlimit]	= KB_REACH_NONE,
	[__NR_getrusage]	= KB_REACH_NONE,
	[__NR_getsid]		= KB_REACH_NONE,
	[__NR_gettid]		= KB_REACH_NONE,
	[__NR_gettimeofday]	= KB_REACH_NONE,
	[__NR_getuid]		= KB_REACH_NONE,
	[__NR_kill]		= KB_REACH_NONE,
	[__NR_personality]	= KB_REACH_NONE,
	[__NR_prlimit64]	= KB_REACH_NONE,
	[__NR_rt_sigaction]	= KB_REACH_NONE,
	[__NR_rt_sigpending]	= KB_REACH_NONE,
	[__NR_rt_sigprocmask]	= KB_REACH_NONE,
	[__NR_rt_sigreturn]	= KB_REACH_NONE,
	[__NR_sched_get_priority_max] = KB_REACH_NONE,
	[__NR_sched_get_priority_min] = KB_REACH_NONE,
	[__NR_sched_getaffinity] = KB_REACH_NONE,
	[__NR_sched_getattr]	= KB_REACH_NONE,
	[__NR_sched_getparam]	= KB_REACH_NONE,
	[__NR_sched_getscheduler] = KB_REACH_NONE,
	[__NR_sched_rr_get_interval] = KB_REACH_NONE,
	[__NR_sched_setaffinity] = KB_REACH_NONE,
	[__NR_sched_setattr]	= KB_REACH_NONE,
	[__NR_sched_setparam]	= KB_REACH_NONE,
	[__NR_sched_setscheduler] = KB_REACH_NONE,
	[__NR_sched_yield]	= KB_REACH_NONE,
	[__NR_set_robust_list]	= KB_REACH_NONE,
	[__NR_set_tid_address]	= KB_REACH_NONE,
	[__NR_setitimer]	= KB_REACH_NONE,
	[__NR_setpriority]	= KB_REACH_NONE,
	[__NR_sigaltstack]	= KB_REACH_NONE,
	[__NR_sysinfo]		= KB_REACH_NONE,
	[__NR_tgkill]		= KB_REACH_NONE,
	[__NR_time]		= KB_REACH_NONE,
	[__NR_times]		= KB_REACH_NONE,
	[__NR_tkill]		= KB_REACH_NONE,
	[__NR_umask]		= KB_REACH_NONE,
	[__NR_uname]		= KB_REACH_NONE,

	[__NR_clock_nanosleep]	= KB_REACH_WAIT,
	[__NR_clone]		= KB_REACH_WAIT,
	[__NR_clone3]		= KB_REACH_WAIT,
	[__NR_fork]		= KB_REACH_WAIT,
	[__NR_futex]		= KB_REACH_WAIT,
	[__NR_msgrcv]		= KB_REACH_WAIT,
	[__NR_msgsnd]		= KB_REACH_WAIT,
	[__NR_nanosleep]	= KB_REACH_WAIT,
	[__NR_pause]		= KB_REACH_WAIT,
	[__NR_rt_sigsuspend]	= KB_REACH_WAIT,
	[__NR_rt_sigtimedwait]	= KB_REACH_WAIT,
	[__NR_semop]		= KB_REACH_WAIT,
	[__NR_semtimedop]	= KB_REACH_WAIT,
	[__NR_vfork]		= KB_REACH_WAIT,
	[__NR_wait4]		= KB_REACH_WAIT,
	[__NR_waitid]		= KB_REACH_WAIT,

	[__NR_io_getevents]	= KB_REACH_LATER,
	[__NR_io_pgetevents]	= KB_REACH_LATER,
	[__NR_io_submit]	= KB_REACH_LATER,
	[__NR_poll]		= KB_REACH_LATER,
	[__NR_ppoll]		= KB_REACH_LATER,
	[__NR_pselect6]		= KB_REACH_LATER,
	/* Of poll(), too. */
	[__NR_restart_syscall]	= KB_REACH_LATER,
	[__NR_select]		= KB_REACH_LATER,
	[__NR_sendfile]		= KB_REACH_LATER,
	[__NR_splice]		= KB_REACH_LATER,
	[__NR_tee]		= KB_REACH_LATER,
#ifdef __NR_close_range
	[__NR_close_range]	= KB_REACH_LATER,
#endif

	[__NR_accept]		= KB_REACH_BY_FILE,
	[__NR_accept4]		= KB_REACH_BY_FILE,
	[__NR_bind]		= KB_REACH_BY_FILE,
	[__NR_close]		= KB_REACH_BY_FILE,
	[__NR_connect]		= KB_REACH_BY_FILE,
	[__NR_epoll_ctl]	= KB_REACH_BY_FILE,
	[__NR_epoll_pwait]	= KB_REACH_BY_FILE,
	[__NR_epoll_wait]	= KB_REACH_BY_FILE,
	[__NR_fcntl]		= KB_REACH_BY_FILE,
	[__NR_fdatasync]	= KB_REACH_BY_FILE,
	[__NR_fsync]		= KB_REACH_BY_FILE,
	[__NR_getpeername]	= KB_REACH_BY_FILE,
	[__NR_getsockname]	= KB_REACH_BY_FILE,
	[__NR_getsockopt]	= KB_REACH_BY_FILE,
	[__NR_io_uring_enter]	= KB_REACH_BY_FILE,
	[__NR_io_uring_register] = KB_REACH_BY_FILE,
	[__NR_ioctl]		= KB_REACH_BY_FILE,
	[__NR_listen]		= KB_REACH_BY_FILE,
	[__NR_pread64]		= KB_REACH_BY_FILE,
	[__NR_preadv]		= KB_REACH_BY_FILE,
	[__NR_preadv2]		= KB_REACH_BY_FILE,
	[__NR_pwrite64]		= KB_REACH_BY_FILE,
	[__NR_pwritev]		= KB_REACH_BY_FILE,
	[__NR_pwritev2]		= KB_REACH_BY_FILE,
	[__NR_read]		= KB_REACH_BY_FILE,
	[__NR_readv]		= KB_REACH_BY_FILE,
	[__NR_recvfrom]		= KB_REACH_BY_FILE,
	[__NR_recvmmsg]		= KB_REACH_BY_FILE,
	[__NR_recvmsg]		= KB_REACH_BY_FILE,
	[__NR_sendmmsg]		= KB_REACH_BY_FILE,
	[__NR_sendmsg]		= KB_REACH_BY_FILE,
	[__NR_sendto]		= KB_REACH_BY_FILE,
	[__NR_setsockopt]	= KB_REACH_BY_FILE,
	[__NR_shutdown]		= KB_REACH_BY_FILE,
	[__NR_vmsplice]		= KB_REACH_BY_FILE,
	[__NR_write]		= KB_REACH_BY_FILE,
	[__NR_writev]		= KB_REACH_BY_FILE,
#ifdef __NR_epoll_pwait2
	[__NR_epoll_pwait2]	= KB_REACH_BY_FILE,
#endif
};

/* Sockets, devices, and files without a type, as those of epoll and io_uring. */
static enum kb_reach kb_file_reach(unsigned int fd)
{
	struct file *file = fget(fd);
	umode_t type;

	if (!file)
		return KB_REACH_CALL;
	type = file_inode(file)->i_mode & S_IFMT;
	fput(file);
	return type == S_IFREG || type == S_IFDIR || type == S_IFIFO ? KB_REACH_CALL :
								       KB_REACH_LATER;
}

/**
 * kb_call_reach() - return what a system call can have to do with a target
 * @regs: of the system call, which has just begun
 * @number: its number
 */
enum kb_reach kb_call_reach(struct pt_regs *regs, long number)
{
	unsigned long arguments[6];
	u8 reach;

	/* Those of 32 bits have other numbers. */
	if (in_ia32_syscall() || number < 0 || number >= ARRAY_SIZE(kb_reaches))
		return KB_REACH_LATER;
	reach = kb_reaches[number];
	if (reach != KB_REACH_BY_FILE)
		return reach;
	syscall_get_arguments(current, regs, arguments);
	return kb_file_reach(arguments[0]);
}
