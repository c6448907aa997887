/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The harness `files`: decodes a case into file-system calls (files-calls.h) and makes them in a
 * directory of its own on a mounted target.
 *
 *	files DIRECTORY [--seconds N] [--differential] [--ignore WHAT]...
 *
 * A case starts in an empty directory, with no file open, and leaves neither behind. In a target
 * where no directory can be made it works on the files that are there, which then get their contents
 * back. It cannot reach anything outside of DIRECTORY: the child has DIRECTORY as its root, without devices, in a
 * mount namespace of its own, because a target may serve symbolic links and device files of its
 * choice. Its calls, their sizes and its time are bounded.
 *
 * Calls between `parallel` and `join` are made by FILES_THREADS threads, which live as long as the
 * child and trace into areas of their own.
 *
 * With --differential the same calls are then made on a tmpfs, by an untraced thread with a root
 * of its own; files-compare.c compares. Sections are made in order then.
 */
#define _GNU_SOURCE
#include "files-world.h"
#include "harness.h"
#include "lane.h"
#include "sweep.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#define WORK "/kcov-bridge-fuzz" /* the directory of the cases, in DIRECTORY */

enum {
	DEFAULT_SECONDS = 2,
	SWEEP_EACH = 32, /* cases: then the whole directory is read, to be sure that it is empty */
	MOST_REPLACED = 8,
};

static const char *directory;
static double seconds = DEFAULT_SECONDS;
static bool differential;
static bool fixed; /* the target lets nothing be made */

static uint8_t input[1 << 20];
static struct files_case present;
static struct files_world target, local;

/* A thread of parallel sections. Main gives it a section, and waits until all are done. */
static struct worker {
	pthread_t thread;
	sem_t begin;
	size_t first, end;
} workers[FILES_THREADS];
static bool workers_run;
static sem_t worker_done;

/* The thread of the local side of a differential case. */
static sem_t local_begin, local_done;
static int local_root = -1;

static int fail(const char *what)
{
	fprintf(stderr, "files: %s: %s\n", what, strerror(errno));
	return 1;
}

static void section(size_t first, size_t end, int thread)
{
	for (size_t i = first; i < end; i++)
		if (present.calls[i].thread == thread)
			files_make(&target, &present.calls[i], &target.results[i]);
}

static void *work(void *argument)
{
	struct worker *worker = argument;

	/* Without a free area it works untraced. */
	runner_thread_begin();
	for (;;) {
		while (sem_wait(&worker->begin))
			;
		section(worker->first, worker->end, worker - workers);
		sem_post(&worker_done);
	}
	return NULL;
}

static void start_workers(void)
{
	workers_run = true;
	sem_init(&worker_done, 0, 0);
	/* The first thread is the one that runs the case. */
	for (int i = 1; i < FILES_THREADS; i++) {
		sem_init(&workers[i].begin, 0, 0);
		if (pthread_create(&workers[i].thread, NULL, work, &workers[i])) {
			perror("files: pthread_create");
			_exit(1);
		}
	}
}

/* Make the calls of a section, from after `parallel` up to `join`. Returns where it ends. */
static size_t run_section(size_t first)
{
	bool used[FILES_THREADS] = {false};
	size_t end = first;
	int others = 0;

	for (; end < present.count && present.calls[end].kind != FILES_join; end++)
		used[present.calls[end].thread] = true;
	if (!workers_run)
		start_workers();
	for (int i = 1; i < FILES_THREADS; i++) {
		if (!used[i])
			continue;
		workers[i].first = first;
		workers[i].end = end;
		sem_post(&workers[i].begin);
		others++;
	}
	section(first, end, 0);
	for (; others; others--)
		while (sem_wait(&worker_done))
			;
	return end;
}

static void run_case(void)
{
	files_begin(&target, seconds);
	for (size_t i = 0; i < present.count; i++) {
		if (present.calls[i].kind == FILES_parallel && !differential)
			i = run_section(i + 1);
		else
			files_make(&target, &present.calls[i], &target.results[i]);
	}
	files_close(&target);
}

static void *run_local(void *unused)
{
	(void)unused;
	/* A root and a working directory of this thread alone. */
	if (unshare(CLONE_FS) || fchdir(local_root) || chroot(".") || !files_renew(WORK)) {
		perror("files: the root of the local side");
		_exit(1);
	}
	for (;;) {
		while (sem_wait(&local_begin))
			;
		if (fixed)
			files_copy_fixed();
		files_begin(&local, 10 * seconds);
		for (size_t i = 0; i < present.count; i++)
			if (!files_left_out(&present.calls[i], &target.results[i]))
				files_make(&local, &present.calls[i], &local.results[i]);
			else
				local.results[i] = (struct files_result){.state = LEFT_OUT};
		files_close(&local);
		files_walk(&local.tree);
		if (!files_renew(WORK))
			_exit(1);
		sem_post(&local_done);
	}
	return NULL;
}

static bool differs(void)
{
	static char text[1 << 14];
	size_t length;

	files_walk(&target.tree);
	sem_post(&local_begin);
	while (sem_wait(&local_done))
		;
	length = files_compare(&present, &target, &local, text, sizeof(text));
	if (length)
		runner_output(text, length);
	return length;
}

/* Have an empty directory as the working one: the last, or another. Returns whether that worked. */
static bool renew(void)
{
	static char name[32] = WORK;
	static unsigned int replaced;

	while (!files_renew(name)) {
		struct stat status;

		/* Nothing can be made; or the target does not let go of what it has: work elsewhere. */
		if (lstat(name, &status) || ++replaced > MOST_REPLACED)
			return false;
		snprintf(name, sizeof(name), WORK ".%u", replaced);
	}
	return true;
}

/* Leave an empty directory to the next case. */
static void clean(void)
{
	static unsigned int cases;

	if (fixed) {
		if (target.written)
			files_put_back(target.written);
		return;
	}
	if (!target.changed) {
		if (files_remove(&target) && ++cases % SWEEP_EACH)
			return;
		if (sweep_all())
			return;
	}
	if (!renew()) {
		fprintf(stderr, "files: %s" WORK " cannot be emptied\n", directory);
		_exit(1);
	}
}

static int files_run(const uint8_t *data, size_t length)
{
	int status = 0;

	if (length > sizeof(input))
		length = sizeof(input);
	memcpy(input, data, length);
	files_decode(input, length, &present);
	run_case();
	if (differential && differs())
		status = SIGABRT; /* as if the comparison were an assertion */
	return status;
}

static int mount_local(void)
{
	/* On top of the target, which the caller has open. */
	if (mount("tmpfs", directory, "tmpfs", MS_NODEV | MS_NOEXEC | MS_NOSUID, "size=64m"))
		return fail("mount a tmpfs");
	local_root = open(directory, O_PATH | O_DIRECTORY | O_CLOEXEC);
	return local_root < 0 ? fail("open the tmpfs") : 0;
}

static int start_local(void)
{
	pthread_t thread;

	sem_init(&local_begin, 0, 0);
	sem_init(&local_done, 0, 0);
	errno = pthread_create(&thread, NULL, run_local, NULL);
	return errno ? fail("pthread_create") : 0;
}

/* Whether an earlier child or runner found that nothing can be made. */
static bool is_known_fixed(void)
{
	size_t length;

	return runner_kept(&length);
}

/* Find what is there, once: in each life of the guest the target is the same. */
static size_t find_fixed(void)
{
	static uint8_t bytes[LANE_KEPT_BYTES];
	size_t length, files;
	const void *kept = runner_kept(&length);

	if (kept)
		return files_load_fixed(kept, length);
	files = files_find_fixed();
	length = files ? files_save_fixed(bytes, sizeof(bytes)) : 0;
	if (length)
		runner_keep(bytes, length);
	return files;
}

static int files_begin_child(void)
{
	/* Another user than root needs a user namespace for it. */
	int namespaces = CLONE_NEWNS | (geteuid() ? CLONE_NEWUSER : 0);
	struct statvfs target_flags;
	int root;

	umask(0);
	if (unshare(namespaces) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return fail("a mount namespace");
	if (mount(directory, directory, NULL, MS_BIND | MS_REC, NULL))
		return fail(directory);
	/* The new mount has only the flags that are given here; these have one number everywhere. */
	if (statvfs(directory, &target_flags) ||
	    mount(NULL, directory, NULL,
		  MS_REMOUNT | MS_BIND | MS_NODEV | MS_NOEXEC | MS_NOSUID |
			  (target_flags.f_flag & (ST_RDONLY | ST_NOATIME | ST_NODIRATIME)),
		  NULL))
		return fail("mount without devices");
	root = open(directory, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (root < 0)
		return fail(directory);
	if (differential && mount_local())
		return 1;
	if (fchdir(root) || chroot("."))
		return fail(directory);
	close(root);
	if (is_known_fixed() || !renew()) {
		/* What is wrong with the target itself shows in its root. */
		fixed = true;
		if (chdir("/") || !find_fixed())
			return fail("no directory can be made on the target, and it has no files");
	}
	if (files_begin_signals())
		return fail("sigaction");
	return differential ? start_local() : 0;
}

static int usage(const char *problem, const char *what)
{
	fprintf(stderr,
		"files: %s%s\nusage: files DIRECTORY [--seconds N] [--differential] "
		"[--ignore WHAT]...\n",
		problem, what);
	return 1;
}

static int files_load(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--differential")) {
			differential = true;
		} else if (!strcmp(argv[i], "--ignore") && i + 1 < argc) {
			if (!files_ignore(argv[++i]))
				return usage("nothing to ignore: ", argv[i]);
		} else if (!strcmp(argv[i], "--seconds") && i + 1 < argc) {
			char *end;

			seconds = strtod(argv[++i], &end);
			if (*end || !(seconds > 0))
				return usage("no number of seconds: ", argv[i]);
		} else if (argv[i][0] == '-' || directory) {
			return usage("unknown argument ", argv[i]);
		} else {
			directory = argv[i];
		}
	}
	return directory ? 0 : usage("no directory", "");
}

RUNNER_HARNESS(files) = {
	.name = "files",
	.load = files_load,
	.begin = files_begin_child,
	.run = files_run,
	.clean = clean,
};
