/* SPDX-License-Identifier: Apache-2.0 */
/* Limits of foreign code, and what is tidied up behind it: scratch.h. */
#define _GNU_SOURCE
#include "scratch.h"

#include "sweep.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/wait.h>
#include <unistd.h>

#define PLACE "/tmp"
#define GROUPS "/sys/fs/cgroup"
#define GROUP GROUPS "/kcov-runner"
#define TEXT(number) TEXT_OF(number)
#define TEXT_OF(number) #number

static struct statfs empty;

static int fail(const char *what)
{
	fprintf(stderr, "kcov-runner: %s: %s\n", what, strerror(errno));
	return 1;
}

static bool write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	ssize_t length = strlen(text);
	bool written = fd >= 0 && write(fd, text, length) == length;

	if (fd >= 0)
		close(fd);
	return written;
}

/*
 * RLIMIT_NPROC does not hold for root, and a machine that is nearly out of memory is slow for long.
 * A kernel without a controller has no such limit.
 */
static void limit_group(void)
{
	unsigned long long bytes = (unsigned long long)sysconf(_SC_PHYS_PAGES) *
				   (unsigned long long)sysconf(_SC_PAGESIZE) / 100 *
				   SCRATCH_MEMORY_PERCENT;
	char text[32];
	struct stat status;

	if (stat(GROUPS "/cgroup.controllers", &status) &&
	    mount("cgroup2", GROUPS, "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL))
		return;
	snprintf(text, sizeof(text), "%llu", bytes);
	write_text(GROUPS "/cgroup.subtree_control", "+pids");
	write_text(GROUPS "/cgroup.subtree_control", "+memory");
	mkdir(GROUP, 0755);
	write_text(GROUP "/memory.max", text);
	write_text(GROUP "/memory.oom.group", "1");
	write_text(GROUP "/pids.max", TEXT(SCRATCH_TASKS));
	write_text(GROUP "/cgroup.procs", "0");
}

int scratch_begin(void)
{
	write_text("/proc/self/oom_score_adj", "1000");
	/* Orphans of the case become the child's, which sees then that there are some. */
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return fail("a mount namespace");
	limit_group();
	if (mount("tmpfs", PLACE, "tmpfs", MS_NODEV | MS_NOSUID, "size=25%,mode=1777"))
		return fail("mount a tmpfs on " PLACE);
	if (mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL))
		return fail("make the root read-only");
	if (chdir(PLACE) || statfs(PLACE, &empty))
		return fail(PLACE);
	return 0;
}

void scratch_clean(bool alone)
{
	struct statfs now;
	pid_t pid = 0;

	while (alone && (pid = waitpid(-1, NULL, WNOHANG)) > 0)
		;
	/*
	 * Process 1 of the namespace is the runner's, which it cannot kill. Without a namespace only
	 * the end of the child ends the others.
	 */
	if (alone && pid == 0) {
		if (getppid() != 1)
			_exit(0);
		kill(-1, SIGKILL);
		while (waitpid(-1, NULL, 0) > 0 || errno == EINTR)
			;
	}
	if (chdir(PLACE) || statfs(".", &now))
		_exit(0);
	if (now.f_bfree == empty.f_bfree && now.f_ffree == empty.f_ffree)
		return;
	if (!sweep_all())
		_exit(0);
}
