/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kcov-exec: runs any unmodified command under kcov and writes the PCs, or the comparisons, to a
 * file.
 *
 * It uses only the kcov device, as any program would: open, KCOV_INIT_TRACE, mmap, then
 * KCOV_ENABLE in the child just before exec (which keeps kcov), and reads the area when the child
 * has ended. With -f every further process and thread asks for its own descriptor through
 * libkcovexec.so (kcov.h has the protocol, libkcovexec.c says when).
 *
 * With -s it does none of that: the host keeps the PCs, the module follows the command's children,
 * and kcov-exec executes the command in its own process.
 *
 * The life of a trace: ASKING (connected, with -f) → OFFERED (descriptor sent) → TRACING →
 * collected.
 * The area stays mapped here all the time, so nothing is lost, regardless of how the process ends.
 */
#define _GNU_SOURCE
#include "kcov.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define DEVICE_VARIABLE "KCOV_EXEC_DEVICE"
#define LIBRARY_VARIABLE "KCOV_EXEC_LIBRARY"
#ifndef LIBRARY
#define LIBRARY "/usr/lib/kcov-bridge/libkcovexec.so"
#endif

/* 4 MiB of area, as syzkaller takes for one program. */
#define DEFAULT_ENTRIES (512UL * 1024)

#define ENOTSUPP 524 /* the kernel's own errno, which user-space headers lack */

enum { EXIT_FAILED = 125, EXIT_NOT_EXECUTABLE = 126, EXIT_NOT_FOUND = 127 };

enum state { ASKING, OFFERED, TRACING };

struct trace {
	struct trace *next; /* newest first */
	enum state state;
	pid_t pid, tid;
	bool same_pids; /* its thread id is valid in this PID namespace while the thread lives */
	int pidfd;
	int connection; /* to libkcovexec.so until the thread traces, else -1 */
	int kcov;
	uint64_t *area;
	char name[16];
};

/* The step at which the child failed before it ran the command. */
enum step { STEP_ENABLE, STEP_EXEC };

struct failure {
	enum step step;
	int error;
};

/* Size of the bitmap with -u: more bits than one workload reaches blocks of a kernel. */
#define BITMAP_WORDS 8192UL

static unsigned long entries = DEFAULT_ENTRIES;
/* Words of the bitmap, which come before the count. */
static unsigned long bitmap;
static bool verbose, follow, binary, comparisons;
static const char *device_path;
static const char *output_path;
static FILE *output;
/* The first error of a write to it, or 0. */
static int output_error;
static struct trace *traces;

static const char help[] =
	"usage: kcov-exec [-o FILE] [-b] [-n ENTRIES] [-f] [-u | -c] [-v] -- CMD [ARGUMENT]...\n"
	"       kcov-exec -s STREAM [-f] -- CMD [ARGUMENT]...\n"
	"\n"
	"Run CMD with kcov enabled and exit with its status.\n"
	"\n"
	"  -o FILE     write the PCs to FILE (- is standard output), one 0x%016lx per line;\n"
	"              without -o they are only counted\n"
	"  -b          write them in binary, 8 bytes each\n"
	"  -n ENTRIES  size of each area in 64-bit words, a multiple of 512 (default 524288);\n"
	"              one word is the count, so ENTRIES-1 PCs fit\n"
	"  -f          follow: also trace child processes and threads, each with its own area\n"
	"  -u          unique: record each PC once per area, in the order of first occurrence;\n"
	"              a bitmap takes 65536 bytes of each area (KCOV_UNIQUE_ENABLE)\n"
	"  -c          record comparisons instead of PCs (KCOV_TRACE_CMP): a line has the type, two\n"
	"              operands and the PC; each takes four words of ENTRIES\n"
	"  -v          print the number of PCs of each process on standard error\n"
	"  -s STREAM   send the PCs to the host, which gave the stream this number; kcov-bridge run\n"
	"              does so\n"
	"\n"
	"PCs are written process by process, in the order in which the processes ended. Processes\n"
	"that still run when CMD ends come last, with the PCs they have so far.\n"
	"\n"
	"With -f alone, a preloaded library follows the children: each traced thread begins with the\n"
	"few system calls that set it up. The library does not follow statically linked programs,\n"
	"set-user-ID programs, processes made with a bare clone(2), programs that clear LD_PRELOAD,\n"
	"and those in another network namespace; programs built with -fsanitize=address and programs\n"
	"that forbid themselves sockets may fail. With -s the kernel module follows all of them.\n"
	"\n"
	"Exit status: CMD's own; 128+N if signal N ended it; 125 if kcov-exec itself failed,\n"
	"126 if CMD could not be executed, 127 if it was not found.\n"
	"\n"
	"Environment: KCOV_EXEC_DEVICE names the device; by default it is the first of\n"
	"/sys/kernel/debug/kcov_bridge, /sys/kernel/debug/kcov and /dev/kcov that can be opened.\n"
	"KCOV_EXEC_LIBRARY names the library that follows.\n";

static const char *const known_devices[] = {
	"/sys/kernel/debug/kcov_bridge", /* where the kernel has a kcov of its own */
	"/sys/kernel/debug/kcov",
	"/dev/kcov",
};

/* Signals that are handed on to CMD when another process sends them to kcov-exec. */
static const int forwarded[] = {
	SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGALRM, SIGWINCH, SIGCONT,
};

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("kcov-exec: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
}

/* ---- the device ---------------------------------------------------------------------------- */

/* Finds the device and leaves its path in device_path. Returns an open descriptor or -1. */
static int find_device(void)
{
	const char *wish = getenv(DEVICE_VARIABLE);
	int fd, error = ENOENT;

	if (wish) {
		device_path = wish;
		fd = open(wish, O_RDWR | O_CLOEXEC);
		if (fd < 0)
			say("can't open %s (from " DEVICE_VARIABLE "): %s", wish, strerror(errno));
		return fd;
	}
	for (size_t i = 0; i < sizeof(known_devices) / sizeof(known_devices[0]); i++) {
		device_path = known_devices[i];
		fd = open(device_path, O_RDWR | O_CLOEXEC);
		if (fd >= 0)
			return fd;
		if (errno != ENOENT) {
			error = errno;
			say("can't open %s: %s", device_path, strerror(errno));
		}
	}
	if (error == ENOENT)
		say("there is no kcov device: none of %s, %s, %s exists. Is debugfs mounted and "
		    "the module kcov_bridge loaded?",
		    known_devices[0], known_devices[1], known_devices[2]);
	else if (error == EACCES || error == EPERM)
		say("only root may open the device: run kcov-exec as root");
	return -1;
}

/* Returns why KCOV_INIT_TRACE or mmap failed, and the remedy. */
static const char *advice(int error)
{
	switch (error) {
	case ENOMEM:
		return ": no room for the area; choose a smaller -n, or give the bridge a larger "
		       "region";
	case EINVAL:
		return ": the device does not take this size; choose another -n";
	case ENOTTY:
		return ": this is no kcov device";
	default:
		return "";
	}
}

/* Initialises and maps an instance. Returns 0 or an errno, with a message unless quiet. */
static int make_area(struct trace *trace, bool quiet)
{
	const char *step = "KCOV_INIT_TRACE";
	int error = 0;

	if (ioctl(trace->kcov, KCOV_INIT_TRACE, entries)) {
		error = errno;
	} else {
		void *area = mmap(NULL, entries * sizeof(uint64_t), PROT_READ | PROT_WRITE,
				  MAP_SHARED, trace->kcov, 0);

		if (area == MAP_FAILED) {
			step = "mmap";
			error = errno;
		} else {
			trace->area = area;
			__atomic_store_n(&trace->area[bitmap], 0, __ATOMIC_RELAXED);
		}
	}
	if (error && !quiet)
		say("%s: %s of %lu entries: %s%s", device_path, step, entries, strerror(error),
		    advice(error));
	return error;
}

/* ---- traces ---------------------------------------------------------------------------------- */

static struct trace *add_trace(enum state state)
{
	struct trace *trace = calloc(1, sizeof(*trace));

	if (!trace) {
		say("out of memory");
		return NULL;
	}
	*trace = (struct trace){ .next = traces, .state = state, .pidfd = -1, .connection = -1,
				 .kcov = -1 };
	traces = trace;
	return trace;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void drop_trace(struct trace *trace)
{
	struct trace **link = &traces;

	while (*link != trace)
		link = &(*link)->next;
	*link = trace->next;
	if (trace->area)
		munmap(trace->area, entries * sizeof(uint64_t));
	close_fd(&trace->pidfd);
	close_fd(&trace->connection);
	close_fd(&trace->kcov);
	free(trace);
}

static void write_bytes(const void *bytes, size_t size)
{
	if (!output_error && fwrite(bytes, 1, size, output) != size)
		output_error = errno ? errno : EIO;
}

/* printf is too slow here: an area may hold half a million PCs, and the guest may be emulated. */
static void write_words(const uint64_t *words, uint64_t count, unsigned int a_line)
{
	static const char digits[] = "0123456789abcdef";
	char text[] = "0x0000000000000000\n";

	if (binary) {
		write_bytes(words, count * sizeof(*words));
		return;
	}
	for (uint64_t i = 0; i < count; i++) {
		uint64_t word = words[i];

		for (int at = 17; at > 1; at--, word >>= 4)
			text[at] = digits[word & 15];
		text[18] = (i + 1) % a_line ? ' ' : '\n';
		write_bytes(text, sizeof(text) - 1);
	}
}

/* Writes the PCs or comparisons of a trace, and ends it. */
static void collect(struct trace *trace)
{
	uint64_t count =
		trace->area ? __atomic_load_n(&trace->area[bitmap], __ATOMIC_ACQUIRE) : 0;
	unsigned int each = comparisons ? KCOV_WORDS_PER_CMP : 1;
	uint64_t room = (entries - bitmap - 1) / each;
	const char *what = comparisons ? "comparisons" : "PCs";
	bool full = count >= room;

	if (count > room)
		count = room;
	if (output && count)
		write_words(trace->area + bitmap + 1, count * each, each);
	if (verbose && (count || trace->state == TRACING))
		say("%d%s %s: %lu %s", (int)trace->tid, trace->tid == trace->pid ? "" : " (thread)",
		    trace->name, (unsigned long)count, what);
	if (full)
		say("%d %s: the area is full, %s were lost; a larger -n than %lu holds more",
		    (int)trace->tid, trace->name, what, entries);
	drop_trace(trace);
}

static void read_name(struct trace *trace)
{
	char path[64];
	ssize_t got = -1;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/comm", (int)trace->pid, (int)trace->tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	got = read(fd, trace->name, sizeof(trace->name) - 1);
	close(fd);
	if (got > 0)
		trace->name[got - 1] = '\0'; /* in place of the newline */
}

/* ---- following ------------------------------------------------------------------------------- */

/* Makes the socket that libkcovexec.so connects to. It is abstract, so that it ends with this
 * process and can be reached from a chroot and by any user. */
static int make_server(char *name, size_t size)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	uint64_t salt = 0;
	size_t length;
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (getrandom(&salt, sizeof(salt), GRND_NONBLOCK) < 0)
		salt = (uint64_t)getpid(); /* early in boot; the name must only be unique */
	snprintf(name, size, "kcov-exec-%d-%016lx", (int)getpid(), (unsigned long)salt);
	length = strlen(name);
	memcpy(address.sun_path + 1, name, length);
	if (fd < 0 ||
	    bind(fd, (struct sockaddr *)&address,
		 (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length)) ||
	    listen(fd, SOMAXCONN)) {
		say("can't make the socket for -f: %s", strerror(errno));
		close_fd(&fd);
	}
	return fd;
}

/* Sets the environment by which CMD and its children load the library. */
static bool set_environment(const char *name)
{
	const char *library = getenv(LIBRARY_VARIABLE), *other = getenv("LD_PRELOAD");
	char preload[PATH_MAX * 2];

	if (!library)
		library = LIBRARY;
	if (access(library, R_OK)) {
		say("can't follow: %s: %s; set " LIBRARY_VARIABLE " to the path of libkcovexec.so",
		    library, strerror(errno));
		return false;
	}
	snprintf(preload, sizeof(preload), "%s%s%s", library, other && *other ? ":" : "",
		 other ? other : "");
	return !setenv("LD_PRELOAD", preload, 1) && !setenv(FOLLOW_VARIABLE, name, 1);
}

static void accept_trace(int server)
{
	int connection = accept4(server, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	struct ucred peer;
	socklen_t length = sizeof(peer);
	struct trace *trace;

	if (connection < 0)
		return;
	trace = add_trace(ASKING);
	if (!trace) {
		close(connection);
		return;
	}
	trace->connection = connection;
	if (!getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &length)) {
		trace->pid = trace->tid = peer.pid;
		trace->pidfd = (int)syscall(SYS_pidfd_open, peer.pid, 0);
	}
	if (trace->pidfd < 0)
		drop_trace(trace); /* it ended before it asked */
}

/* Collects the traces of a process's threads that have ended, so that many short threads do not
 * fill the region. Called when one of its threads asks: after an exec the new image's first thread
 * always asks before others, and protects the older traces (see offer). */
static void collect_ended_threads(pid_t pid)
{
	struct trace *trace = traces, *next;

	for (; trace; trace = next) {
		char path[64];

		next = trace->next;
		if (trace->state != TRACING || trace->pid != pid || trace->tid == pid ||
		    !trace->same_pids)
			continue;
		snprintf(path, sizeof(path), "/proc/%d/task/%d", (int)pid, (int)trace->tid);
		if (access(path, F_OK) && errno == ENOENT)
			collect(trace);
	}
}

/* Returns true if this first thread still traces after an exec. If the old image had other traced
 * threads, one of them may have called exec and so become the first, with another thread id. Then
 * no trace is collected before the process ends, and the result of KCOV_ENABLE decides. */
static bool already_traced(const struct trace *asking)
{
	struct trace *first = NULL;
	bool others = false;

	for (struct trace *trace = traces; trace; trace = trace->next) {
		if (trace == asking || trace->state != TRACING || trace->pid != asking->pid)
			continue;
		if (trace->tid == trace->pid) {
			first = trace;
		} else {
			others = true;
			trace->same_pids = false;
		}
		read_name(trace); /* exec changed it */
	}
	return first && !others;
}

static bool send_message(struct trace *trace, enum follow_kind kind, int value, int fd)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	struct follow_message message = { .kind = kind, .value = value };
	struct iovec part = { &message, sizeof(message) };
	struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1 };

	if (fd >= 0) {
		struct cmsghdr *attached;

		header.msg_control = control.bytes;
		header.msg_controllen = sizeof(control.bytes);
		attached = CMSG_FIRSTHDR(&header);
		attached->cmsg_level = SOL_SOCKET;
		attached->cmsg_type = SCM_RIGHTS;
		attached->cmsg_len = CMSG_LEN(sizeof(fd));
		memcpy(CMSG_DATA(attached), &fd, sizeof(fd));
	}
	return sendmsg(trace->connection, &header, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0;
}

/* Answers a HELLO with a new instance. */
static void offer(struct trace *trace, const struct follow_message *hello)
{
	int error;

	trace->same_pids = hello->pid == trace->pid;
	/* In another PID namespace the ids differ; a first thread is still recognised. */
	trace->tid = hello->value == hello->pid ? trace->pid : hello->value;
	read_name(trace);
	if (trace->tid != trace->pid)
		collect_ended_threads(trace->pid);
	else if (already_traced(trace)) {
		send_message(trace, FOLLOW_DECLINE, 0, -1);
		drop_trace(trace);
		return;
	}
	trace->kcov = open(device_path, O_RDWR | O_CLOEXEC);
	error = trace->kcov < 0 ? errno : make_area(trace, true);
	if (error) {
		say("%d %s runs untraced: %s%s", (int)trace->tid, trace->name, strerror(error),
		    advice(error));
		send_message(trace, FOLLOW_DECLINE, error, -1);
		drop_trace(trace);
	} else if (send_message(trace, FOLLOW_OFFER, comparisons ? FOLLOW_COMPARISONS : (int)bitmap,
				trace->kcov)) {
		trace->state = OFFERED;
	} else {
		drop_trace(trace);
	}
}

/* Reads one message of the library. The trace may be gone afterwards. */
static void listen_to(struct trace *trace)
{
	struct follow_message message;
	ssize_t got = recv(trace->connection, &message, sizeof(message), MSG_DONTWAIT);

	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (got == (ssize_t)sizeof(message) && trace->state == ASKING &&
	    message.kind == FOLLOW_HELLO) {
		offer(trace, &message);
	} else if (got == (ssize_t)sizeof(message) && trace->state == OFFERED &&
		   message.kind == FOLLOW_ENABLED) {
		close_fd(&trace->connection);
		if (!message.value) {
			trace->state = TRACING;
		} else {
			/* EBUSY: it traces through an instance that it had before exec. */
			if (message.value != EBUSY)
				say("%d %s runs untraced: KCOV_ENABLE: %s", (int)trace->tid,
				    trace->name, strerror(message.value));
			drop_trace(trace);
		}
	} else if (trace->state == ASKING) {
		drop_trace(trace);
	} else {
		/* The connection ended, perhaps after ENABLE; the area shows that at the end. */
		close_fd(&trace->connection);
	}
}

/* Collects a trace whose process has ended, after reading its last message. */
static void end_trace(struct trace *trace)
{
	if (trace->state == OFFERED && trace->connection >= 0) {
		struct follow_message message;

		if (recv(trace->connection, &message, sizeof(message), MSG_DONTWAIT) ==
			    (ssize_t)sizeof(message) &&
		    message.kind == FOLLOW_ENABLED && !message.value)
			trace->state = TRACING;
	}
	collect(trace);
}

/* ---- running the command --------------------------------------------------------------------- */

__attribute__((noreturn)) static void run_child(struct trace *trace, int pipe_fd, char **command,
						const sigset_t *mask)
{
	struct failure failure = { .step = STEP_ENABLE };

	sigprocmask(SIG_SETMASK, mask, NULL);
	if (!(bitmap ? ioctl(trace->kcov, KCOV_UNIQUE_ENABLE, bitmap) :
		       ioctl(trace->kcov, KCOV_ENABLE,
			     comparisons ? KCOV_TRACE_CMP : KCOV_TRACE_PC))) {
		failure.step = STEP_EXEC;
		execvp(command[0], command);
	}
	failure.error = errno;
	if (write(pipe_fd, &failure, sizeof(failure)) < 0)
		_exit(EXIT_FAILED);
	_exit(EXIT_NOT_FOUND);
}

/* Prints why the command did not start. Returns the exit status for that. */
static int explain(const struct failure *failure, const char *command)
{
	if (failure->step == STEP_ENABLE) {
		if (comparisons && failure->error == ENOTSUPP)
			say("%s: the device has no comparisons; start the bridge with --comparisons",
			    device_path);
		else
			say("%s: KCOV_ENABLE: %s", device_path, strerror(failure->error));
		return EXIT_FAILED;
	}
	say("can't execute %s: %s", command, strerror(failure->error));
	return failure->error == ENOENT ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE;
}

/* Handles pending signals. Returns true once the command has ended. */
static bool handle_signals(int signals, pid_t child)
{
	struct signalfd_siginfo signal;
	siginfo_t info = { 0 };

	while (read(signals, &signal, sizeof(signal)) == (ssize_t)sizeof(signal))
		/* CMD already has the terminal's signals, which reach the whole foreground group. */
		if (signal.ssi_signo != SIGCHLD && signal.ssi_code != SI_KERNEL)
			kill(child, (int)signal.ssi_signo);
	/* The child stays a zombie until its trace is collected, so that its name can be read. */
	return !waitid(P_PID, (id_t)child, &info, WEXITED | WNOHANG | WNOWAIT) && info.si_pid;
}

/* One round of waiting. Returns true once the command has ended. */
static bool wait_once(int signals, int server, pid_t child)
{
	struct trace *trace, *next;
	struct pollfd *polled;
	size_t count = 2, i;
	bool ended;

	for (trace = traces; trace; trace = trace->next)
		count += 2;
	polled = calloc(count, sizeof(*polled));
	if (!polled) {
		say("out of memory");
		return handle_signals(signals, child);
	}
	polled[0] = (struct pollfd){ .fd = signals, .events = POLLIN };
	polled[1] = (struct pollfd){ .fd = server, .events = POLLIN };
	for (trace = traces, i = 2; trace; trace = trace->next, i += 2) {
		polled[i] = (struct pollfd){ .fd = trace->pidfd, .events = POLLIN };
		polled[i + 1] = (struct pollfd){ .fd = trace->connection, .events = POLLIN };
	}
	if (poll(polled, count, -1) < 0 && errno != EINTR)
		say("poll: %s", strerror(errno));
	/* Ended processes first, and the newest of them first, because a child ends before the
	 * parent that waits for it. */
	for (trace = traces, i = 2; i < count; trace = next, i += 2) {
		next = trace->next;
		if (polled[i].revents && trace->pid != child)
			end_trace(trace);
	}
	for (trace = traces; trace; trace = next) {
		struct pollfd one = { .fd = trace->connection, .events = POLLIN };

		next = trace->next;
		if (trace->connection >= 0 && poll(&one, 1, 0) > 0) {
			listen_to(trace);
			next = traces; /* this one or others may be gone: start over */
		}
	}
	ended = handle_signals(signals, child);
	if (polled[1].revents)
		accept_trace(server);
	free(polled);
	return ended;
}

static int run(char **command)
{
	struct trace *trace = add_trace(TRACING);
	struct failure failure;
	int server = -1, signals, pipe_fds[2], status = 0;
	sigset_t mask, old_mask;
	char name[64];
	ssize_t received;
	pid_t child;

	if (!trace)
		return EXIT_FAILED;
	trace->same_pids = true;
	trace->kcov = find_device();
	if (trace->kcov < 0 || make_area(trace, false))
		return EXIT_FAILED;
	if (follow) {
		server = make_server(name, sizeof(name));
		if (server < 0 || !set_environment(name))
			return EXIT_FAILED;
	}
	sigemptyset(&mask);
	sigaddset(&mask, SIGCHLD);
	for (size_t i = 0; i < sizeof(forwarded) / sizeof(forwarded[0]); i++)
		sigaddset(&mask, forwarded[i]);
	sigprocmask(SIG_BLOCK, &mask, &old_mask);
	signals = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signals < 0 || pipe2(pipe_fds, O_CLOEXEC)) {
		say("can't set up: %s", strerror(errno));
		return EXIT_FAILED;
	}

	child = fork();
	if (child < 0) {
		say("fork: %s", strerror(errno));
		return EXIT_FAILED;
	}
	if (!child)
		run_child(trace, pipe_fds[1], command, &old_mask);
	trace->pid = trace->tid = child;
	close(pipe_fds[1]);

	/* Exec closes the pipe before the library of a followed command sends its first message. */
	do {
		received = read(pipe_fds[0], &failure, sizeof(failure));
	} while (received < 0 && errno == EINTR);
	close(pipe_fds[0]);
	if (received == (ssize_t)sizeof(failure)) {
		waitpid(child, NULL, 0);
		return explain(&failure, command[0]);
	}

	while (!wait_once(signals, server, child))
		;
	for (struct trace *own = traces, *next; own; own = next) {
		next = own->next;
		if (own->pid == child && own->tid == child)
			read_name(own);
	}
	/* First the traces of processes that ended before the command, then the command's, then
	 * those of processes that outlive it. */
	for (int round = 0; round < 3; round++) {
		struct trace *next;

		for (struct trace *left = traces; left; left = next) {
			struct pollfd one = { .fd = left->pidfd, .events = POLLIN };
			bool own = left->pid == child;

			next = left->next;
			if (round == 0 ? !own && left->pidfd >= 0 && poll(&one, 1, 0) > 0 :
			    round == 1 ? own :
					 true)
				end_trace(left);
		}
	}
	waitpid(child, &status, 0);
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* Makes the host keep the PCs of CMD, and executes CMD. Returns an exit status only on failure. */
static int join_stream(const char *text, char **command)
{
	unsigned long stream;
	int fd, error;
	char *end;

	errno = 0;
	stream = strtoul(text, &end, 0);
	if (errno || end == text || *end || *text == '-' || !stream || stream & KCOV_BRIDGE_FOLLOW) {
		say("-s %s: STREAM must be a number that kcov-bridge gave", text);
		return EXIT_FAILED;
	}
	/* The descriptor is closed by exec; the thread traces on. */
	fd = find_device();
	if (fd < 0)
		return EXIT_FAILED;
	if (ioctl(fd, KCOV_BRIDGE_STREAM, stream | (follow ? KCOV_BRIDGE_FOLLOW : 0))) {
		say("%s: KCOV_BRIDGE_STREAM: %s%s", device_path, strerror(errno),
		    errno == ESRCH  ? ": the host has no such stream, or has closed it" :
		    errno == ENOMEM ? ": the region has no room; give the bridge a larger region" :
				      "");
		return EXIT_FAILED;
	}
	execvp(command[0], command);
	error = errno;
	say("can't execute %s: %s", command[0], strerror(error));
	return error == ENOENT ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE;
}

static bool parse_entries(const char *text)
{
	unsigned long words_a_page = (unsigned long)sysconf(_SC_PAGESIZE) / sizeof(uint64_t);
	char *end;

	errno = 0;
	entries = strtoul(text, &end, 0);
	if (errno || end == text || *end || *text == '-' || !entries || entries > INT_MAX / 8 ||
	    entries % words_a_page) {
		say("-n %s: ENTRIES must be a multiple of %lu and at most %d", text, words_a_page,
		    INT_MAX / 8 / (int)words_a_page * (int)words_a_page);
		return false;
	}
	return true;
}

int main(int argc, char **argv)
{
	static const struct option options[] = { { "help", no_argument, NULL, 'h' }, { 0 } };
	const char *stream = NULL;
	int option, status;

	while ((option = getopt_long(argc, argv, "+o:bn:fucvs:h", options, NULL)) >= 0) {
		switch (option) {
		case 'o':
			output_path = optarg;
			break;
		case 's':
			stream = optarg;
			break;
		case 'n':
			if (!parse_entries(optarg))
				return EXIT_FAILED;
			break;
		case 'b':
			binary = true;
			break;
		case 'f':
			follow = true;
			break;
		case 'u':
			bitmap = BITMAP_WORDS;
			break;
		case 'c':
			comparisons = true;
			break;
		case 'v':
			verbose = true;
			break;
		case 'h':
			fputs(help, stdout);
			return 0;
		default:
			say("try --help");
			return EXIT_FAILED;
		}
	}
	if (comparisons && bitmap) {
		say("-u and -c cannot be combined");
		return EXIT_FAILED;
	}
	if (stream && (output_path || binary || comparisons || bitmap || verbose ||
		       entries != DEFAULT_ENTRIES)) {
		say("-s can be combined with -f only: the host decides the rest");
		return EXIT_FAILED;
	}
	if (bitmap + 2 > entries) {
		say("-n %lu: with -u the bitmap alone takes %lu entries", entries, bitmap);
		return EXIT_FAILED;
	}
	if (optind >= argc) {
		say("no command given; try --help");
		return EXIT_FAILED;
	}
	if (stream)
		return join_stream(stream, argv + optind);
	if (output_path) {
		/* A separate descriptor, for standard output too, which CMD does not inherit. */
		int fd = strcmp(output_path, "-") ?
				 open(output_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666) :
				 fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3);

		output = fd >= 0 ? fdopen(fd, "w") : NULL;
		if (!output) {
			say("can't write to %s: %s", output_path, strerror(errno));
			return EXIT_FAILED;
		}
	}
	status = run(argv + optind);
	if (output && fclose(output) && !output_error)
		output_error = errno;
	if (output_error) {
		say("can't write to %s: %s; the PCs are incomplete", output_path,
		    strerror(output_error));
		return EXIT_FAILED;
	}
	return status;
}
