/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kcov-init: the guest's first process, from the first instruction in user mode to power-off.
 *
 * One static program, three lives:
 *
 *   /init in the initramfs    loads the modules named in /modules/load, finds the squashfs disk,
 *                             puts a tmpfs over it, copies /layer on top, switches root and
 *                             executes itself there;
 *   process 1 of the guest    network, kcov_bridge.ko, the kcov device, SSH, and the reports on the
 *                             second serial port; then it reaps, watches the power button and
 *                             ends the guest;
 *   poweroff, reboot          ask process 1 to do so (with -f: at once, without asking).
 *
 * A report is one JSON object a line on /dev/ttyS1:
 *
 *   {"state":"ready","kernel":"…","device":"…","uptime_ms":N,"mem_available_kib":N}
 *   {"state":"unhealthy","what":"module","why":"…"}
 *   {"state":"stopping","why":"power button"}
 *
 * The host says two things there, each a line that is answered "ready". One to a guest that is to
 * be saved: have an sshd that listens and is in the snapshot, standing still until
 *
 *   sshd
 *
 * the other, to a guest that goes on from a snapshot: the time, as seconds and nanoseconds, and 32
 * random bytes in hex, so that neither the clock nor the random numbers of the snapshot go on.
 *
 *   resume 1700000000 500000000 00112233…
 *
 * An unhealthy guest still serves SSH where it can, so that a person can look. SSH connections are
 * accepted here and each is given to an `sshd -i` of its own: nothing has to start before the
 * guest is ready, and there is no daemon that could die. An sshd that was saved costs a connection
 * a fork only, with no program to be linked; when it dies, things are as they were without.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <linux/random.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

/* Where the agent layer puts this program and the module; bridge/guest/images/builder.py does the same. */
#define SELF "/usr/sbin/kcov-init"
#define MODULE_FORMAT "/usr/lib/modules/%s/extra/kcov_bridge.ko"
#define MODULE_PARAMETER "kcov_bridge."

#define REPORT_PORT "/dev/ttyS1"
#define RESUME_LINE_MAX 256
#define SEED_BYTES 32
#define HOST_NAME "kcov-guest"

/* The module tells the host about this kernel when this is written to. */
#define HOST_FILE "/sys/kernel/debug/kcov_bridge_host"

/* The addresses of QEMU's user network: the guest's usual one, and the gateway. */
#define ADDRESS "10.0.2.15"
#define NETMASK "255.255.255.0"
#define GATEWAY "10.0.2.2"

#define SSHD "/usr/sbin/sshd"
#define SSH_HOST_KEY "/etc/ssh/ssh_host_ed25519_key"
#define SSH_PORT 22
/* From OpenSSH 9.8 on sshd executes this for each connection, so there is nothing to be saved. */
#define SSHD_SESSION "/usr/lib/openssh/sshd-session"
#define SSHD_PID_FILE "/run/sshd.pid"
#define SSHD_WAIT_MS 5000

/* How long the disk or the network interface may take to appear after its driver is loaded. */
#define DEVICE_WAIT_MS 5000
/* How long processes get to end after SIGTERM, and the last sync to finish. */
#define TERM_WAIT_MS 2000
#define TERM_AGAIN_MS 100
#define SYNC_WAIT_MS 2000

#define MAX_BUTTONS 8

static const char *const devices[] = {
	"/sys/kernel/debug/kcov_bridge", /* where the kernel has a kcov of its own */
	"/sys/kernel/debug/kcov",
	"/dev/kcov",
};

static int report_fd = -1;
static int ssh_listener = -1;
static pid_t ssh_daemon; /* listens instead of this process, if it is not 0 */

/* ---- small things ------------------------------------------------------------------------ */

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("kcov-init: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
}

static void sleep_ms(long ms)
{
	struct timespec pause = { ms / 1000, ms % 1000 * 1000000L };

	nanosleep(&pause, NULL);
}

static long uptime_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_BOOTTIME, &now);
	return now.tv_sec * 1000L + now.tv_nsec / 1000000L;
}

/* Reads a whole small file into a string; an unreadable one is an empty string. */
static void read_text(const char *path, char *text, size_t size)
{
	size_t length = 0;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd >= 0) {
		ssize_t got;

		while (length < size - 1 && (got = read(fd, text + length, size - 1 - length)) > 0)
			length += (size_t)got;
		close(fd);
	}
	text[length] = '\0';
}

/* True if the kernel's command line has this word. */
static bool kernel_argument(const char *word)
{
	char text[4096], *rest = text, *token;

	read_text("/proc/cmdline", text, sizeof(text));
	while ((token = strsep(&rest, " \n")))
		if (!strcmp(token, word))
			return true;
	return false;
}

static bool mount_at(const char *type, const char *at, unsigned long flags, const char *options)
{
	if (mkdir(at, 0755) && errno != EEXIST)
		say("mkdir %s: %s", at, strerror(errno));
	if (mount(type, at, type, flags, options) && errno != EBUSY) {
		say("mount %s on %s: %s", type, at, strerror(errno));
		return false;
	}
	return true;
}

/* Loads a module that may be loaded already. Returns 0 or an errno. */
static int load_module(const char *path, const char *parameters)
{
	int error = 0, fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return errno;
	if (syscall(SYS_finit_module, fd, parameters, 0) && errno != EEXIST)
		error = errno;
	close(fd);
	return error;
}

/* ---- reports ----------------------------------------------------------------------------- */

static void open_report_port(void)
{
	struct termios port;

	report_fd = open(REPORT_PORT, O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
	if (report_fd < 0) {
		say("%s: %s; the host will not hear from this guest", REPORT_PORT, strerror(errno));
		return;
	}
	if (!tcgetattr(report_fd, &port)) {
		cfmakeraw(&port);
		port.c_cflag |= CLOCAL | CREAD;
		tcsetattr(report_fd, TCSANOW, &port);
	}
}

/* Writes one line. The port takes what fits its buffer at once, the rest within a second: a host
 * that does not read must not stop the guest. */
static void write_report(const char *line)
{
	size_t left = strlen(line);
	int patience = 100;

	while (left && report_fd >= 0) {
		ssize_t done = write(report_fd, line, left);

		if (done > 0) {
			line += done;
			left -= (size_t)done;
		} else if (done < 0 && errno != EAGAIN && errno != EINTR) {
			return;
		} else {
			if (!patience--)
				return;
			sleep_ms(10);
		}
	}
}

/* A JSON string with its quotes; text that does not fit is cut. */
static const char *json_string(const char *text, char *out, size_t size)
{
	size_t n = 0;

	out[n++] = '"';
	for (; *text && n + 8 < size; text++) {
		unsigned char c = (unsigned char)*text;

		if (c == '"' || c == '\\')
			n += (size_t)snprintf(out + n, size - n, "\\%c", c);
		else if (c < 0x20 || c >= 0x7f)
			n += (size_t)snprintf(out + n, size - n, "\\u%04x", c);
		else
			out[n++] = (char)c;
	}
	out[n++] = '"';
	out[n] = '\0';
	return out;
}

static void report_ready(const char *device)
{
	char line[1024], kernel[256], path[128], memory[4096];
	struct utsname system;
	const char *available;

	uname(&system);
	read_text("/proc/meminfo", memory, sizeof(memory));
	available = strstr(memory, "MemAvailable:");
	snprintf(line, sizeof(line),
		 "{\"state\":\"ready\",\"kernel\":%s,\"device\":%s,\"uptime_ms\":%ld,"
		 "\"mem_available_kib\":%ld}\n",
		 json_string(system.release, kernel, sizeof(kernel)),
		 json_string(device, path, sizeof(path)), uptime_ms(),
		 available ? strtol(available + strlen("MemAvailable:"), NULL, 10) : -1L);
	write_report(line);
}

static void report_unhealthy(const char *what, const char *why)
{
	char line[1024], quoted[768];

	say("unhealthy: %s: %s", what, why);
	snprintf(line, sizeof(line), "{\"state\":\"unhealthy\",\"what\":\"%s\",\"why\":%s}\n", what,
		 json_string(why, quoted, sizeof(quoted)));
	write_report(line);
}

static void report_stopping(const char *why)
{
	char line[256], quoted[128];

	snprintf(line, sizeof(line), "{\"state\":\"stopping\",\"why\":%s}\n",
		 json_string(why, quoted, sizeof(quoted)));
	write_report(line);
}

/* ---- the initramfs ----------------------------------------------------------------------- */

/* The end of a boot that can't go on: say why and power off, rather than panic. */
__attribute__((noreturn)) static void give_up(const char *what, const char *why)
{
	report_unhealthy(what, why);
	sleep_ms(200); /* let the serial port drain */
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

/* Loads what /modules/load names, a path a line, dependencies first. One that fails is told and
 * passed over: the guest may do without it, and where it can't, what is missing is said later. */
static void load_listed_modules(void)
{
	char list[8192], *rest = list, *path;

	read_text("/modules/load", list, sizeof(list));
	while ((path = strsep(&rest, "\n"))) {
		int error = *path ? load_module(path, "") : 0;

		if (error)
			say("%s: %s", path, strerror(error));
	}
}

/* Finds the virtio disk that holds a squashfs. */
static bool find_root(char *path, size_t size)
{
	for (int waited = 0; waited <= DEVICE_WAIT_MS; waited += 50) {
		for (char letter = 'a'; letter <= 'z'; letter++) {
			char magic[4] = "";
			int fd;

			snprintf(path, size, "/dev/vd%c", letter);
			fd = open(path, O_RDONLY | O_CLOEXEC);
			if (fd < 0)
				continue;
			if (read(fd, magic, sizeof(magic)) != (ssize_t)sizeof(magic))
				magic[0] = '\0';
			close(fd);
			if (!memcmp(magic, "hsqs", 4)) /* the squashfs superblock's first word */
				return true;
		}
		sleep_ms(50);
	}
	return false;
}

static bool copy_file(int from, int to, const char *name, mode_t mode)
{
	char buffer[65536];
	ssize_t got = -1;
	int in = openat(from, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	int out = openat(to, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

	if (in >= 0 && out >= 0)
		while ((got = read(in, buffer, sizeof(buffer))) > 0)
			if (write(out, buffer, (size_t)got) != got) {
				got = -1;
				break;
			}
	if (out >= 0) {
		if (fchmod(out, mode & 07777))
			got = -1;
		close(out);
	}
	if (in >= 0)
		close(in);
	return !got;
}

/* Copies a tree of directories, files and symbolic links, all root's. Closes both descriptors. */
static bool copy_tree(int from, int to)
{
	bool good = true;
	struct dirent *entry;
	DIR *directory = fdopendir(from);

	if (!directory) {
		close(from);
		close(to);
		return false;
	}
	while ((entry = readdir(directory))) {
		const char *name = entry->d_name;
		char target[4096];
		struct stat about;
		ssize_t length;

		if (!strcmp(name, ".") || !strcmp(name, ".."))
			continue;
		if (fstatat(from, name, &about, AT_SYMLINK_NOFOLLOW)) {
			good = false;
		} else if (S_ISDIR(about.st_mode)) {
			int below_from, below_to;

			if (mkdirat(to, name, 0700) && errno != EEXIST)
				good = false;
			below_from = openat(from, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
			below_to = openat(to, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
			if (below_to >= 0 && fchmod(below_to, about.st_mode & 07777))
				good = false;
			good = copy_tree(below_from, below_to) && good;
		} else if (S_ISLNK(about.st_mode)) {
			length = readlinkat(from, name, target, sizeof(target) - 1);
			target[length > 0 ? length : 0] = '\0';
			if (symlinkat(target, to, name))
				good = false;
		} else {
			good = copy_file(from, to, name, about.st_mode) && good;
		}
	}
	closedir(directory);
	close(to);
	return good;
}

/* Deletes what the initramfs holds, to give its memory back; stays on its file system. */
static void delete_tree(int at, dev_t device)
{
	struct dirent *entry;
	DIR *directory = fdopendir(at);

	if (!directory)
		return;
	while ((entry = readdir(directory))) {
		const char *name = entry->d_name;
		struct stat about;

		if (!strcmp(name, ".") || !strcmp(name, "..") ||
		    fstatat(at, name, &about, AT_SYMLINK_NOFOLLOW) || about.st_dev != device)
			continue;
		if (S_ISDIR(about.st_mode)) {
			int below = openat(at, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

			if (below >= 0)
				delete_tree(below, device);
			unlinkat(at, name, AT_REMOVEDIR);
		} else {
			unlinkat(at, name, 0);
		}
	}
	closedir(directory);
}

/* Writes the kernel's own symbols (no modules') to the second disk as a System.map and powers off.
 * Debian's kernel package has no System.map, so the image's builder boots the image once for it. */
__attribute__((noreturn)) static void dump_symbols(void)
{
	char line[1024];
	FILE *in = fopen("/proc/kallsyms", "re"), *out = fopen("/dev/vdb", "we");

	if (!in || !out)
		give_up("symbols", strerror(errno));
	while (fgets(line, sizeof(line), in))
		if (!strchr(line, '['))
			fputs(line, out);
	fputs("end\n", out);
	if (fflush(out) || fsync(fileno(out)))
		give_up("symbols", strerror(errno));
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static void stage_initramfs(void)
{
	struct stat initramfs;
	char disk[32];
	int old_root;

	load_listed_modules();
	if (kernel_argument("kcov_init.symbols"))
		dump_symbols();
	if (!find_root(disk, sizeof(disk)))
		give_up("disk", "no virtio disk with a squashfs was found");

	mkdir("/lower", 0755);
	mkdir("/root", 0755);
	if (mount(disk, "/lower", "squashfs", MS_RDONLY, NULL))
		give_up("disk", strerror(errno));
	if (!mount_at("tmpfs", "/rw", 0, "mode=0755"))
		give_up("overlay", "no tmpfs for what the guest writes");
	mkdir("/rw/upper", 0755);
	mkdir("/rw/work", 0755);
	if (!copy_tree(open("/layer", O_RDONLY | O_DIRECTORY | O_CLOEXEC),
		       open("/rw/upper", O_RDONLY | O_DIRECTORY | O_CLOEXEC)))
		give_up("layer", "the agent's files could not be copied out of the initramfs");
	if (mount("overlay", "/root", "overlay", 0,
		  "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work"))
		give_up("overlay", strerror(errno));

	if (mount("/proc", "/root/proc", NULL, MS_MOVE, NULL) ||
	    mount("/sys", "/root/sys", NULL, MS_MOVE, NULL) ||
	    mount("/dev", "/root/dev", NULL, MS_MOVE, NULL))
		give_up("root", strerror(errno));
	old_root = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (chdir("/root") || fstat(old_root, &initramfs))
		give_up("root", strerror(errno));
	delete_tree(old_root, initramfs.st_dev);
	if (mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
		give_up("root", strerror(errno));
	execl(SELF, "kcov-init", (char *)NULL);
	give_up("root", "the root file system has no " SELF);
}

/* ---- process 1: setting the guest up ------------------------------------------------------ */

static struct sockaddr_in address_of(const char *text, uint16_t port)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };

	inet_pton(AF_INET, text, &address.sin_addr);
	return address;
}

static bool interface_up(int fd, const char *name, const char *address, const char *netmask)
{
	struct ifreq request = { 0 };
	struct sockaddr_in own = address_of(address, 0), mask = address_of(netmask, 0);

	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	memcpy(&request.ifr_addr, &own, sizeof(own));
	if (ioctl(fd, SIOCSIFADDR, &request))
		return false;
	memcpy(&request.ifr_netmask, &mask, sizeof(mask));
	if (ioctl(fd, SIOCSIFNETMASK, &request))
		return false;
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	return !ioctl(fd, SIOCSIFFLAGS, &request);
}

/* Sets lo and eth0 up. Returns NULL or what is wrong. */
static const char *set_network_up(void)
{
	static char why[128];
	struct rtentry route = { .rt_flags = RTF_UP | RTF_GATEWAY };
	struct sockaddr_in gateway = address_of(GATEWAY, 0), any = address_of("0.0.0.0", 0);
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	const char *step = "lo";
	bool good = interface_up(fd, "lo", "127.0.0.1", "255.0.0.0");

	for (int waited = 0; good && access("/sys/class/net/eth0", F_OK); waited += 20) {
		if (waited > DEVICE_WAIT_MS)
			break;
		sleep_ms(20);
	}
	if (good) {
		step = "eth0";
		good = interface_up(fd, "eth0", ADDRESS, NETMASK);
	}
	if (good) {
		step = "default route";
		memcpy(&route.rt_dst, &any, sizeof(any));
		memcpy(&route.rt_genmask, &any, sizeof(any));
		memcpy(&route.rt_gateway, &gateway, sizeof(gateway));
		good = !ioctl(fd, SIOCADDRT, &route) || errno == EEXIST;
	}
	if (!good)
		snprintf(why, sizeof(why), "%s: %s", step, strerror(errno));
	close(fd);
	return good ? NULL : why;
}

/* The module's parameters, as the kernel's command line gives them: kcov_bridge.NAME=VALUE. */
static void module_parameters(char *out, size_t size)
{
	char text[4096], *rest = text, *token;
	size_t n = 0;

	out[0] = '\0';
	read_text("/proc/cmdline", text, sizeof(text));
	while ((token = strsep(&rest, " \n"))) {
		size_t prefix = strlen(MODULE_PARAMETER);

		if (!strncmp(token, MODULE_PARAMETER, prefix) && n + strlen(token) + 2 < size)
			n += (size_t)snprintf(out + n, size - n, "%s ", token + prefix);
	}
}

/* Loads kcov_bridge.ko and opens the device once. Returns the device's path, or NULL after having
 * said what is wrong in *what and *why. */
static const char *set_device_up(const char **what, char *why, size_t size)
{
	char path[256], parameters[1024];
	struct utsname system;
	size_t n = 0;
	int error;

	uname(&system);
	snprintf(path, sizeof(path), MODULE_FORMAT, system.release);
	module_parameters(parameters, sizeof(parameters));
	error = load_module(path, parameters);
	if (error) {
		*what = "module";
		snprintf(why, size, "%s: %s", access(path, F_OK) ? path : "finit_module",
			 strerror(error));
		return NULL;
	}
	*what = "device";
	for (size_t i = 0; i < sizeof(devices) / sizeof(devices[0]); i++) {
		int fd = open(devices[i], O_RDWR | O_CLOEXEC);

		if (fd >= 0) {
			close(fd);
			return devices[i];
		}
		n += (size_t)snprintf(why + n, size - n, "%s%s: %s", n ? "; " : "", devices[i],
				      strerror(errno));
	}
	return NULL;
}

/* Listens for SSH. Returns the socket, or -1 after having said what is wrong in why. */
static int listen_for_ssh(char *why, size_t size)
{
	struct sockaddr_in any = address_of("0.0.0.0", SSH_PORT);
	int yes = 1, fd;

	mkdir("/run/sshd", 0755);
	if (access(SSHD, X_OK) || access(SSH_HOST_KEY, R_OK)) {
		snprintf(why, size, "%s: %s", access(SSHD, X_OK) ? SSHD : SSH_HOST_KEY,
			 strerror(errno));
		return -1;
	}
	fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)) ||
	    bind(fd, (struct sockaddr *)&any, sizeof(any)) || listen(fd, 64)) {
		snprintf(why, size, "port %d: %s", SSH_PORT, strerror(errno));
		if (fd >= 0)
			close(fd);
		return -1;
	}
	return fd;
}

/* In the child that is going to be an sshd. */
static void leave_process_1(void)
{
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	setsid();
}

static void serve_ssh(void)
{
	int connection = accept4(ssh_listener, NULL, NULL, SOCK_CLOEXEC);
	pid_t child;
	int yes = 1;

	if (connection < 0)
		return;
	/* Else a small message waits for the last one's acknowledgement. */
	setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
	child = fork();
	if (child < 0)
		say("an SSH connection was refused: fork: %s", strerror(errno));
	if (child) {
		close(connection);
		return;
	}
	leave_process_1();
	/* Standard error stays the console: that is where sshd's -e logs to. */
	dup2(connection, STDIN_FILENO);
	dup2(connection, STDOUT_FILENO);
	execl(SSHD, SSHD, "-i", "-e", (char *)NULL);
	say("%s: %s", SSHD, strerror(errno));
	_exit(127);
}

/* Goes on to accept connections here when the daemon has died. */
static void replace_ssh_daemon(void)
{
	char why[128];

	ssh_daemon = 0;
	ssh_listener = listen_for_ssh(why, sizeof(why));
	if (ssh_listener < 0)
		say("sshd: %s", why);
}

/* Starts an sshd that listens, and stops it there: whoever connects waits until resume() lets it go
 * on, with random numbers that are not the snapshot's. -r has it fork without another exec. */
static void start_ssh_daemon(void)
{
	int nothing, waited = 0;

	if (ssh_daemon || ssh_listener < 0 || !access(SSHD_SESSION, F_OK))
		return;
	close(ssh_listener);
	ssh_listener = -1;
	unlink(SSHD_PID_FILE);
	ssh_daemon = fork();
	if (!ssh_daemon) {
		leave_process_1();
		nothing = open("/dev/null", O_RDWR | O_CLOEXEC);
		dup2(nothing, STDIN_FILENO);
		dup2(nothing, STDOUT_FILENO);
		/* As many at once as there are without a daemon. */
		execl(SSHD, SSHD, "-D", "-e", "-r", "-4", "-oPidFile=" SSHD_PID_FILE,
		      "-oMaxStartups=1000", (char *)NULL);
		_exit(127);
	}
	/* It writes the file when it listens. */
	while (ssh_daemon > 0 && access(SSHD_PID_FILE, F_OK) && waited < SSHD_WAIT_MS) {
		sleep_ms(10);
		waited += 10;
		if (waitpid(ssh_daemon, NULL, WNOHANG))
			ssh_daemon = -1;
	}
	if (ssh_daemon > 0 && !access(SSHD_PID_FILE, F_OK)) {
		kill(ssh_daemon, SIGSTOP);
		return;
	}
	if (ssh_daemon > 0) {
		kill(ssh_daemon, SIGKILL);
		waitpid(ssh_daemon, NULL, 0);
	}
	replace_ssh_daemon();
}

/* Opens every input device that has a power key. */
static size_t open_buttons(struct pollfd *buttons)
{
	size_t count = 0;

	for (int i = 0; i < 32 && count < MAX_BUTTONS; i++) {
		unsigned long keys[KEY_MAX / (8 * sizeof(long)) + 1] = { 0 };
		char path[32];
		int fd;

		snprintf(path, sizeof(path), "/dev/input/event%d", i);
		fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
		if (fd < 0)
			continue;
		if (ioctl(fd, EVIOCGBIT(EV_KEY, sizeof(keys)), keys) >= 0 &&
		    keys[KEY_POWER / (8 * sizeof(long))] >> KEY_POWER % (8 * sizeof(long)) & 1)
			buttons[count++] = (struct pollfd){ .fd = fd, .events = POLLIN };
		else
			close(fd);
	}
	return count;
}

static bool power_key_pressed(int fd)
{
	struct input_event event;

	while (read(fd, &event, sizeof(event)) == (ssize_t)sizeof(event))
		if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
			return true;
	return false;
}

/* ---- going on from a snapshot -------------------------------------------------------------- */

static bool add_randomness(const char *hex)
{
	struct {
		struct rand_pool_info info;
		unsigned char bytes[SEED_BYTES];
	} seed = { .info = { .entropy_count = 8 * SEED_BYTES, .buf_size = SEED_BYTES } };
	bool good;
	int fd;

	for (size_t i = 0; i < SEED_BYTES; i++)
		if (sscanf(hex + 2 * i, "%2hhx", &seed.bytes[i]) != 1)
			return false;
	fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
	/* Added to what is there, then used for all numbers from now on. */
	good = fd >= 0 && !ioctl(fd, RNDADDENTROPY, &seed) && !ioctl(fd, RNDRESEEDCRNG);
	if (fd >= 0)
		close(fd);
	return good;
}

static void resume(const char *line, const char *device)
{
	char hex[2 * SEED_BYTES + 1] = "";
	struct timespec now;
	int fd;

	if (sscanf(line, "resume %ld %ld %64[0-9a-f]", &now.tv_sec, &now.tv_nsec, hex) != 3 ||
	    strlen(hex) != 2 * SEED_BYTES)
		return;
	if (clock_settime(CLOCK_REALTIME, &now)) {
		report_unhealthy("clock", strerror(errno));
		return;
	}
	if (!add_randomness(hex)) {
		report_unhealthy("random", strerror(errno));
		return;
	}
	/* What it forks has none of the snapshot's random numbers: sshd asks the kernel for each, and
	 * OpenSSL seeds anew from there after a fork. */
	if (ssh_daemon > 0)
		kill(ssh_daemon, SIGCONT);
	fd = open(HOST_FILE, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, "1", 1) != 1) {
		report_unhealthy("host", strerror(errno));
		if (fd >= 0)
			close(fd);
		return;
	}
	close(fd);
	report_ready(device);
}

/* Takes what the host wrote, line by line. */
static void hear_host(const char *device)
{
	static char line[RESUME_LINE_MAX];
	static size_t length;
	char c;

	while (read(report_fd, &c, 1) == 1) {
		if (c == '\n' && device) {
			line[length] = '\0';
			if (!strcmp(line, "sshd")) {
				start_ssh_daemon();
				report_ready(device);
			} else {
				resume(line, device);
			}
		}
		if (c == '\n')
			length = 0;
		else if (length < sizeof(line) - 1)
			line[length++] = c;
	}
}

/* ---- the end ------------------------------------------------------------------------------ */

/* True once no process but this one is left: all orphans are this process's children. */
static bool reap_for(long ms)
{
	long end = uptime_ms() + ms;

	for (;;) {
		pid_t pid = waitpid(-1, NULL, WNOHANG);

		if (pid < 0 && errno == ECHILD)
			return true;
		if (pid <= 0) {
			if (uptime_ms() >= end)
				return false;
			sleep_ms(5);
		}
	}
}

/* Ends all processes, then the guest. Nothing here waits without a bound: a mount whose server is
 * gone may keep a process, or sync itself, for ever. */
__attribute__((noreturn)) static void stop_guest(int how, const char *why)
{
	long waited;

	report_stopping(why);
	/* More than once: sshd misses a signal that comes just before it waits for its connection. */
	for (waited = 0; waited < TERM_WAIT_MS; waited += TERM_AGAIN_MS) {
		kill(-1, SIGTERM);
		if (reap_for(TERM_AGAIN_MS))
			break;
	}
	if (waited >= TERM_WAIT_MS) {
		kill(-1, SIGKILL);
		reap_for(TERM_WAIT_MS);
	}
	if (!fork()) {
		sync();
		_exit(0);
	}
	reap_for(SYNC_WAIT_MS);
	reboot(how);
	for (;;)
		pause();
}

/* ---- process 1: its life ------------------------------------------------------------------ */

__attribute__((noreturn)) static void stage_guest(void)
{
	struct pollfd polled[3 + MAX_BUTTONS] = { { .fd = -1 }, { .fd = -1 }, { .fd = -1 } };
	const char *device, *network, *what = NULL;
	char why[512] = "";
	size_t buttons;
	sigset_t signals;

	sigemptyset(&signals);
	sigaddset(&signals, SIGCHLD);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGPIPE);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	polled[0].fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
	polled[0].events = POLLIN;

	sethostname(HOST_NAME, strlen(HOST_NAME));
	setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
	setenv("HOME", "/root", 1);
	umask(022);
	mount_at("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666");
	mount_at("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
	mount_at("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755");
	mkdir("/run/kcov-bridge", 0755);
	mount_at("debugfs", "/sys/kernel/debug", 0, "mode=0700");
	/* Ctrl-Alt-Del comes as a signal instead of a hard reset. */
	reboot(RB_DISABLE_CAD);

	network = set_network_up();
	device = set_device_up(&what, why, sizeof(why));
	buttons = open_buttons(polled + 3);

	/* One report of the first thing that is wrong, in the order in which a person would look. */
	if (!device)
		report_unhealthy(what, why);
	ssh_listener = listen_for_ssh(why, sizeof(why));
	polled[1].events = POLLIN;
	polled[2].fd = report_fd;
	polled[2].events = POLLIN;
	if (device && ssh_listener < 0)
		report_unhealthy("sshd", why);
	else if (device && network)
		report_unhealthy("network", network);
	else if (device)
		report_ready(device);

	for (;;) {
		struct signalfd_siginfo signal;
		pid_t ended;

		polled[1].fd = ssh_listener;
		if (poll(polled, 3 + buttons, -1) < 0 && errno != EINTR)
			say("poll: %s", strerror(errno));
		while (read(polled[0].fd, &signal, sizeof(signal)) == (ssize_t)sizeof(signal)) {
			if (signal.ssi_signo == SIGTERM)
				stop_guest(RB_POWER_OFF, "poweroff");
			if (signal.ssi_signo == SIGINT)
				stop_guest(RB_AUTOBOOT, "reboot");
		}
		while ((ended = waitpid(-1, NULL, WNOHANG)) > 0)
			if (ended == ssh_daemon)
				replace_ssh_daemon();
		if (polled[1].revents & POLLIN)
			serve_ssh();
		if (polled[2].revents & POLLIN)
			hear_host(device);
		for (size_t i = 3; i < 3 + buttons; i++)
			if (polled[i].revents && power_key_pressed(polled[i].fd))
				stop_guest(RB_POWER_OFF, "power button");
	}
}

/* ---- poweroff and reboot ------------------------------------------------------------------ */

static int ask_for_end(const char *name, int argc, char **argv)
{
	bool reboots = !strcmp(name, "reboot"), force = argc == 2 && !strcmp(argv[1], "-f");

	if (argc > 1 && !force) {
		fprintf(stderr, "usage: %s [-f]\n"
				"Ends all processes and %s the guest; -f does it at once.\n",
			name, reboots ? "restarts" : "powers off");
		return 2;
	}
	if (force) {
		sync();
		reboot(reboots ? RB_AUTOBOOT : RB_POWER_OFF);
	} else if (!kill(1, reboots ? SIGINT : SIGTERM)) {
		return 0;
	}
	fprintf(stderr, "%s: %s\n", name, strerror(errno));
	return 1;
}

int main(int argc, char **argv)
{
	const char *slash = strrchr(argv[0], '/'), *name = slash ? slash + 1 : argv[0];
	int console;

	if (getpid() != 1)
		return ask_for_end(strcmp(name, "kcov-init") ? name : "poweroff", argc, argv);

	if (access("/proc/self", F_OK)) { /* else they came along from the initramfs */
		mount_at("proc", "/proc", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL);
		mount_at("sysfs", "/sys", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL);
		mount_at("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
	}
	/* The initramfs has no /dev/console, so the kernel could open none for us. */
	console = open("/dev/console", O_RDWR | O_NOCTTY);
	if (console >= 0) {
		dup2(console, STDIN_FILENO);
		dup2(console, STDOUT_FILENO);
		dup2(console, STDERR_FILENO);
		if (console > STDERR_FILENO)
			close(console);
	}
	open_report_port();

	if (!access("/modules/load", F_OK)) /* only the initramfs has it */
		stage_initramfs();
	stage_guest();
}
