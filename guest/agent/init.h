/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Declarations that the files of kcov-init share.
 *
 *	init.c			the order of a boot: main, the initramfs's part, the guest's part
 *	init-initramfs.c	from the boot modules to the guest's root
 *	init-setup.c		file systems, network, module and kcov device
 *	init-ssh.c		connections to SSH
 *	init-host.c		requests of the host on the report port, and what follows a load
 *	init-channel.c		commands of the host on the virtio-serial port
 *	init-command.c		the processes of such a command
 *	init-report.c		reports to the host on that port
 *	init-power.c		the power button, and the end of the guest
 *	init-util.c		files, mounts, modules, time
 *
 * Process 1 has one thread. The report port, the virtio-serial port with its commands, and the socket
 * of SSH are state of the file that owns them; all other state is passed as arguments.
 */
#ifndef KCOV_BRIDGE_AGENT_INIT_H
#define KCOV_BRIDGE_AGENT_INIT_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* The path of this program in the guest; bridge/guest/images/builder.py has the same. */
#define SELF "/usr/sbin/kcov-init"

/* How long the disk or the network interface may take to appear after its driver is loaded. */
#define DEVICE_WAIT_MS 5000

#define MAX_POWER_BUTTONS 8

/* ---- init-initramfs.c ---------------------------------------------------------------------- */

/* True in the initramfs, false in the guest's root. */
bool in_initramfs(void);
/* Loads what /modules/load names. */
void load_boot_modules(void);
/* Writes the kernel's symbols to the second disk and powers off; for the image's builder. */
__attribute__((noreturn)) void dump_symbols(void);
/* Mounts the guest's root at /root: the squashfs, a tmpfs for writes, and the agent's files. */
void mount_root(void);
/* Makes /root the root and executes this program there. */
__attribute__((noreturn)) void switch_root(void);

/* ---- init-setup.c -------------------------------------------------------------------------- */

/* Mounts /proc, /sys and /dev; opens the console as the standard streams. */
void open_console(void);
/* Mounts the guest's other file systems; sets host name and environment. */
void set_up_environment(void);
/* Brings lo and eth0 up. Returns NULL, or the error as text. */
const char *set_up_network(void);
/* Loads kcov_bridge.ko and opens the kcov device once. Returns the device's path, or NULL with
 * the failed part in *what and the reason in why. */
const char *set_up_device(const char **what, char *why, size_t size);

/* ---- init-ssh.c ---------------------------------------------------------------------------- */

/* Listens for SSH. Returns false with the reason in why. */
bool ssh_listen(char *why, size_t size);
/* The socket to poll for connections, or -1. */
int ssh_listener(void);
/* Accepts a connection and starts an sshd for it. */
void ssh_serve(void);

/* ---- init-host.c --------------------------------------------------------------------------- */

/* Carries out the host's requests on the report port. device: the kcov device, or NULL. */
void host_read_requests(const char *device);
/* After a snapshot was loaded: sets the clock, adds 32 random bytes, describes the kernel to the
 * host. Returns false if one of them failed, which is reported. */
bool host_resume(time_t seconds, long nanoseconds, const unsigned char *seed);

/* ---- init-channel.c ------------------------------------------------------------------------ */

/* How many descriptors the channel polls at most. */
#define MAX_CHANNEL_POLLED (1 + 3 * 64)

/* Opens the virtio-serial port, if the machine has one. device: the kcov device, or NULL. */
void channel_open(const char *device);
bool channel_is_open(void);
/* Fills in what to poll; returns how many. Lowers *timeout (milliseconds, -1 for none). */
size_t channel_poll(struct pollfd *polled, int *timeout);
/* Carries out what the host wants, and tells it what there is to tell. */
void channel_serve(const struct pollfd *polled, size_t count);
/* Notes the end of a process, which may lead a command; a leader that was stopped continues. */
void channel_child_changed(pid_t pid, int status);

/* ---- init-command.c ------------------------------------------------------------------------ */

/* The leader of a command's process group, and our ends of its streams. */
struct started {
	pid_t leader;
	int in, out, err;
};

/* Starts a command, see channel.h. Returns 0 or an errno. */
int command_start(uint32_t action, const char *spec, size_t size, struct started *started);
/* What to tell the host of a leader's wait status. */
uint32_t command_status(int status);
/* Sends a signal to a command's process group; SIGKILL also reaches its session's other groups. */
void command_kill(pid_t leader, int signal);

/* ---- init-report.c ------------------------------------------------------------------------- */

void report_open(void);
/* The report port, or -1. */
int report_port(void);
void report_ready(const char *device);
/* Writes the report of a ready guest, without a newline; returns its length. Kernel and memory are
 * as in the first report: to look again after a snapshot was loaded takes most of the answer. */
size_t ready_text(const char *device, char *text, size_t size);
void report_unhealthy(const char *what, const char *why);
void report_stopping(const char *why);

/* ---- init-power.c -------------------------------------------------------------------------- */

/* Opens every input device that has a power key. Returns how many, MAX_POWER_BUTTONS at most. */
size_t power_buttons_open(struct pollfd *buttons);
bool power_button_pressed(int fd);
/* Ends all processes, then the guest. how: as for reboot(2). */
__attribute__((noreturn)) void stop_guest(int how, const char *why);
/* The programs poweroff and reboot. Returns the exit status. */
int ask_for_stop(const char *name, int argc, char **argv);

/* ---- init-util.c --------------------------------------------------------------------------- */

/* Prints a line to the console. */
__attribute__((format(printf, 1, 2))) void say(const char *format, ...);
void sleep_ms(long ms);
long uptime_ms(void);
/* Reads a small file into a string; a file that can't be read gives an empty string. */
void read_text(const char *path, char *text, size_t size);
/* True if the kernel's command line has this word. */
bool kernel_argument(const char *word);
/* Mounts a file system that has no device; creates the directory. */
bool mount_at(const char *type, const char *at, unsigned long flags, const char *options);
/* Loads a module unless it is loaded. Returns 0 or an errno. */
int load_module(const char *path, const char *parameters);

#endif
