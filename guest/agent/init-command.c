/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kcov-init: the processes of a command that the host runs over the channel.
 *
 * A command finds what it would find as a command of SSH: a session of its own whose leader is not
 * the command itself, pipes as its streams, the environment and the directory of the user, and what
 * the start-up files of the user's shell change. The leader is a copy of this program. It waits for
 * the command and ends with the command's status, as a shell would report it.
 */
#define _GNU_SOURCE
#include "channel.h"
#include "init.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef PASSWD
#define PASSWD "/etc/passwd"
#endif
#define USER "root"
#define USER_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define SYSTEM_START_UP "/etc/bash.bashrc"
#define USER_START_UP ".bashrc"
#define MAX_VARIABLES 4096
#define MAX_WORDS 65536
#define BEGUN_FD 9

/* How a leader ends whose command did not begin. */
#define NOT_BEGUN_SIGNAL SIGSYS

/* What bash does for a command of SSH before it runs it. Its stdout is not the command's. */
#define START_UP_SCRIPT                                                                              \
	"exec 8>&1 >/dev/null; for f in " SYSTEM_START_UP " ~/" USER_START_UP "; do "                \
	"[ ! -r $f ] || . $f; done; unset f; exec >&8 8>&-; printf . >&9; exec 9>&-; exec \"$@\""

struct spec {
	char **words;
	size_t word_count;
	char **variables;
	size_t variable_count;
	const char *directory;
};

/* ---- the specification --------------------------------------------------------------------- */

/* Takes the text apart in place. Returns 0 or an errno. */
static int parse(char *text, size_t size, struct spec *spec)
{
	size_t words = 0, variables = 0;

	if (!size || text[size - 1])
		return EINVAL;
	for (size_t at = 0; at < size; at += strlen(text + at) + 1) {
		words += text[at] == 'a';
		variables += text[at] == 'e';
	}
	if (!words || words > MAX_WORDS || variables > MAX_VARIABLES)
		return E2BIG;
	spec->words = calloc(words + 1, sizeof(char *));
	spec->variables = calloc(variables + 1, sizeof(char *));
	if (!spec->words || !spec->variables)
		return ENOMEM;
	for (size_t at = 0; at < size; at += strlen(text + at) + 1) {
		char *value = text + at + 1;

		switch (text[at]) {
		case 'a':
			spec->words[spec->word_count++] = value;
			break;
		case 'e':
			spec->variables[spec->variable_count++] = value;
			break;
		case 'c':
			spec->directory = value;
			break;
		default:
			return EINVAL;
		}
	}
	return 0;
}

/* ---- what SSH would set up ----------------------------------------------------------------- */

static void set_user_up(char *shell, size_t size)
{
	FILE *file = fopen(PASSWD, "re");
	struct passwd *user = NULL;
	const char *home = "/" USER, *program = "/bin/sh";

	while (file && (user = fgetpwent(file)) && strcmp(user->pw_name, USER))
		;
	if (user && *user->pw_dir)
		home = user->pw_dir;
	if (user && *user->pw_shell)
		program = user->pw_shell;
	snprintf(shell, size, "%s", program);
	clearenv();
	setenv("HOME", home, 1);
	setenv("LOGNAME", USER, 1);
	setenv("MAIL", "/var/mail/" USER, 1);
	setenv("PATH", USER_PATH, 1);
	setenv("SHELL", shell, 1);
	setenv("SHLVL", "1", 1);
	setenv("USER", USER, 1);
	setenv("_", "/usr/bin/sh", 1);
	if (chdir(home))
		home = "/";
	setenv("PWD", home, 1);
	if (file)
		fclose(file);
}

/* True if a line ends a start-up file where the shell is not interactive; both forms are Debian's. */
static bool is_for_people(const char *line)
{
	static const char *const forms[] = { "[ -z \"$PS1\" ] && return",
					     "[ -z \"${PS1-}\" ] && return" };

	return !strncmp(line, forms[0], strlen(forms[0])) ||
	       !strncmp(line, forms[1], strlen(forms[1]));
}

/* True if a start-up file of the shell does something. */
static bool has_effect(const char *path)
{
	FILE *file = fopen(path, "re");
	bool effect = false;
	char line[4096];

	while (file && !effect && fgets(line, sizeof(line), file)) {
		const char *text = line + strspn(line, " \t\r\n");

		if (is_for_people(text))
			break;
		effect = *text && *text != '#';
	}
	if (file)
		fclose(file);
	return effect;
}

/* ---- programs ------------------------------------------------------------------------------ */

/* Says on stderr what a shell would. */
static int refuse(int status, const char *what, const char *why)
{
	fprintf(stderr, "sh: 1: %s: %s\n", what, why);
	return status;
}

static int wait_for(pid_t child)
{
	int status;

	while (waitpid(child, &status, 0) < 0)
		if (errno != EINTR)
			return 126;
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* Executes a program in the place of this process; says why it cannot, as a shell would. */
__attribute__((noreturn)) static void become(const struct spec *spec, char **words)
{
	if (spec->directory && chdir(spec->directory)) {
		fprintf(stderr, "sh: 1: cd: can't cd to %s\n", spec->directory);
		_exit(126);
	}
	execvp(words[0], words); /* runs a script without an interpreter's name with sh */
	if (errno == ENOENT || errno == ENOTDIR)
		_exit(refuse(127, words[0], "not found"));
	_exit(refuse(126, words[0], errno == EACCES ? "Permission denied" : strerror(errno)));
}

static int spawn(const struct spec *spec, char **words)
{
	pid_t child = fork();

	if (!child)
		become(spec, words);
	return child < 0 ? refuse(126, "fork", strerror(errno)) : wait_for(child);
}

/* Has bash read its start-up files first. */
static int spawn_with_start_up(struct spec *spec)
{
	char **words = calloc(spec->word_count + 5, sizeof(char *)), begun;
	int pipes[2], status;

	if (!words || pipe2(pipes, O_CLOEXEC | O_NONBLOCK) || dup2(pipes[1], BEGUN_FD) < 0)
		return refuse(126, "bash", strerror(errno));
	close(pipes[1]);
	words[0] = "bash";
	words[1] = "-c";
	words[2] = START_UP_SCRIPT;
	words[3] = "sh";
	memcpy(words + 4, spec->words, spec->word_count * sizeof(char *));
	status = spawn(spec, words);
	close(BEGUN_FD);
	if (read(pipes[0], &begun, 1) != 1)
		kill(getpid(), NOT_BEGUN_SIGNAL);
	return status;
}

static int execute(struct spec *spec, const char *shell)
{
	const char *home = getenv("HOME"), *name = strrchr(shell, '/');
	char path[4096];

	if (spec->directory) {
		setenv("OLDPWD", getenv("PWD"), 1);
		snprintf(path, sizeof(path), "%s/%s", home, spec->directory);
		setenv("PWD", *spec->directory == '/' ? spec->directory : path, 1);
	}
	for (size_t i = 0; i < spec->variable_count; i++)
		putenv(spec->variables[i]);
	snprintf(path, sizeof(path), "%s/" USER_START_UP, home);
	if (!strcmp(name ? name + 1 : shell, "bash") &&
	    (has_effect(path) || has_effect(SYSTEM_START_UP)))
		return spawn_with_start_up(spec);
	return spawn(spec, spec->words);
}

/* ---- files --------------------------------------------------------------------------------- */

static bool copy(int from, int to)
{
	static char buffer[65536];
	ssize_t got;

	while ((got = read(from, buffer, sizeof(buffer))) > 0)
		for (ssize_t at = 0, done; at < got; at += done)
			if ((done = write(to, buffer + at, (size_t)(got - at))) < 0)
				return false;
	return !got;
}

static int complain(const char *path, const char *why)
{
	fprintf(stderr, "%s: %s\n", path, why);
	return 1;
}

/* Writes a file, completely or not at all: only a complete one gets its name. */
static int put_file(const char *path, const char *part, const char *mode)
{
	struct stat about;
	int file;

	file = open(part, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (file < 0)
		return complain(part, strerror(errno));
	if (!copy(STDIN_FILENO, file) || fchmod(file, (mode_t)strtoul(mode, NULL, 8)) ||
	    close(file)) {
		complain(path, strerror(errno));
	} else if (!stat(path, &about) && S_ISDIR(about.st_mode)) {
		complain(path, "is a directory"); /* also through a link, which rename replaces */
	} else if (rename(part, path)) {
		complain(path, strerror(errno));
	} else {
		return 0;
	}
	unlink(part);
	return 1;
}

static int get_file(const char *path)
{
	int file = open(path, O_RDONLY | O_CLOEXEC);

	if (file < 0 || !copy(file, STDOUT_FILENO))
		return complain(path, strerror(errno));
	return 0;
}

/* ---- how the guest is ---------------------------------------------------------------------- */

/* include/linux/syslog.h */
enum { SYSLOG_ACTION_READ_ALL = 3, SYSLOG_ACTION_SIZE_BUFFER = 10 };

static void list_files(const char *beginning)
{
	const char *slash = strrchr(beginning, '/');
	char path[4096];
	DIR *directory;
	struct dirent *entry;

	if (!slash)
		return;
	snprintf(path, sizeof(path), "%.*s", (int)(slash - beginning), beginning);
	directory = opendir(*path ? path : "/");
	while (directory && (entry = readdir(directory)))
		if (!strncmp(entry->d_name, slash + 1, strlen(slash + 1)))
			printf("%s/%s\n", path, entry->d_name);
}

/* Starts no program: this follows each test, and after a reset a program is slow at first. */
static int look(const char *beginning)
{
	int size = klogctl(SYSLOG_ACTION_SIZE_BUFFER, NULL, 0);
	char taint[32], *log = size > 0 ? malloc((size_t)size) : NULL;

	if (log)
		size = klogctl(SYSLOG_ACTION_READ_ALL, log, size);
	if (!log || size < 0)
		return complain("the kernel's log", strerror(errno));
	read_text("/proc/sys/kernel/tainted", taint, sizeof(taint));
	fputs(taint, stdout);
	for (int at = 0, text, end; at < size; at = end + 1) {
		for (end = at; end < size && log[end] != '\n'; end++)
			;
		/* The level in angle brackets is not part of the text. */
		text = at + (log[at] == '<');
		while (text > at && text < end && isdigit((unsigned char)log[text]))
			text++;
		if (text > at && text < end && log[text] == '>')
			at = text + 1;
		fwrite(log + at, 1, (size_t)(end - at), stdout);
		putchar('\n');
	}
	putchar('\0');
	list_files(beginning);
	return fflush(stdout) ? complain("the output", strerror(errno)) : 0;
}

/* ---- the leader ---------------------------------------------------------------------------- */

/* Closes what belongs to process 1: above all the ends of other commands' pipes. */
static void close_others(void)
{
	if (syscall(SYS_close_range, STDERR_FILENO + 1, ~0U, 0))
		for (int fd = STDERR_FILENO + 1; fd < 4096; fd++)
			close(fd);
}

__attribute__((noreturn)) static void lead(uint32_t action, struct spec *spec)
{
	const gid_t group = 0;
	sigset_t none;
	char shell[256];

	setsid();
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	prctl(PR_SET_NAME, "kcov-command");
	setgroups(1, &group);
	set_user_up(shell, sizeof(shell));
	if (action == CHANNEL_PUT)
		_exit(spec->word_count == 3 ?
			      put_file(spec->words[0], spec->words[1], spec->words[2]) : 126);
	if (action == CHANNEL_GET)
		_exit(get_file(spec->words[0]));
	if (action == CHANNEL_LOOK)
		_exit(look(spec->words[0]));
	_exit(execute(spec, shell));
}

/* Returns the child's end at 0 and ours, non-blocking, at 1. */
static bool open_pipe(int ends[2], bool written_by_us)
{
	int pipes[2];

	if (pipe2(pipes, O_CLOEXEC))
		return false;
	ends[0] = pipes[!written_by_us];
	ends[1] = pipes[written_by_us];
	fcntl(ends[1], F_SETFL, O_NONBLOCK);
	return true;
}

int command_start(uint32_t action, const char *text, size_t size, struct started *started)
{
	int streams[3][2] = { { -1, -1 }, { -1, -1 }, { -1, -1 } };
	struct spec spec = { 0 };
	char *copied = malloc(size + 1);
	int error = ENOMEM;

	if (copied) {
		memcpy(copied, text, size);
		error = parse(copied, size, &spec);
	}
	for (int i = 0; i < 3 && !error; i++)
		error = open_pipe(streams[i], i == 0) ? 0 : errno;
	if (!error) {
		started->leader = fork();
		if (started->leader < 0)
			error = errno;
	}
	if (!error && !started->leader) {
		for (int i = 0; i < 3; i++)
			dup2(streams[i][0], i);
		close_others();
		lead(action, &spec);
	}
	for (int i = 0; i < 3; i++) {
		if (streams[i][0] >= 0)
			close(streams[i][0]);
		if (error && streams[i][1] >= 0)
			close(streams[i][1]);
	}
	free(spec.words);
	free(spec.variables);
	free(copied);
	started->in = streams[0][1];
	started->out = streams[1][1];
	started->err = streams[2][1];
	return error;
}

uint32_t command_status(int status)
{
	if (WIFSIGNALED(status) && WTERMSIG(status) == NOT_BEGUN_SIGNAL)
		return CHANNEL_NOT_BEGUN;
	return (uint32_t)(WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
}

/* Kills the processes of a session that have left its leader's group. */
static void kill_session(pid_t session)
{
	DIR *processes = opendir("/proc");
	struct dirent *entry;

	while (processes && (entry = readdir(processes))) {
		char path[300], text[512], *end;
		int of;

		if (!isdigit((unsigned char)entry->d_name[0]))
			continue;
		snprintf(path, sizeof(path), "/proc/%s/stat", entry->d_name);
		read_text(path, text, sizeof(text));
		end = strrchr(text, ')');
		if (end && sscanf(end, ") %*c %*d %*d %d", &of) == 1 && of == session)
			kill((pid_t)atoi(entry->d_name), SIGKILL);
	}
}

void command_kill(pid_t leader, int number)
{
	/* By a process of its own: a command may have mounted something over /proc. */
	if (number == SIGKILL && !fork()) {
		kill_session(leader);
		_exit(0);
	}
	/* Just after its start it does not lead a group yet. */
	if (kill(-leader, number))
		kill(leader, number);
}
