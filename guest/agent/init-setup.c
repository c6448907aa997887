/* SPDX-License-Identifier: Apache-2.0 */
/* kcov-init: console, file systems, network, and the module with its kcov device. */
#define _GNU_SOURCE
#include "init.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#define HOST_NAME "kcov-guest"

/* The addresses of QEMU's user network: the guest's usual one, and the gateway. */
#define ADDRESS "10.0.2.15"
#define NETMASK "255.255.255.0"
#define GATEWAY "10.0.2.2"

/* The module's path in the agent's layer; bridge/guest/images/builder.py has the same. */
#define MODULE_FORMAT "/usr/lib/modules/%s/extra/kcov_bridge.ko"
#define MODULE_PARAMETER "kcov_bridge."

static const char *const devices[] = {
	"/sys/kernel/debug/kcov_bridge", /* the name on a kernel that has a kcov of its own */
	"/sys/kernel/debug/kcov",
	"/dev/kcov",
};

void open_console(void)
{
	int console;

	if (access("/proc/self", F_OK)) { /* the initramfs; switch_root() moves them to the guest */
		mount_at("proc", "/proc", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL);
		mount_at("sysfs", "/sys", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL);
		mount_at("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
	}
	/* The kernel opened no console for this process: the initramfs has no /dev/console. */
	console = open("/dev/console", O_RDWR | O_NOCTTY);
	if (console >= 0) {
		dup2(console, STDIN_FILENO);
		dup2(console, STDOUT_FILENO);
		dup2(console, STDERR_FILENO);
		if (console > STDERR_FILENO)
			close(console);
	}
}

void set_up_environment(void)
{
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
}

/* ---- network ------------------------------------------------------------------------------- */

static struct sockaddr_in address_of(const char *text)
{
	struct sockaddr_in address = { .sin_family = AF_INET };

	inet_pton(AF_INET, text, &address.sin_addr);
	return address;
}

static bool interface_up(int fd, const char *name, const char *address, const char *netmask)
{
	struct ifreq request = { 0 };
	struct sockaddr_in own = address_of(address), mask = address_of(netmask);

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

const char *set_up_network(void)
{
	static char why[128];
	struct rtentry route = { .rt_flags = RTF_UP | RTF_GATEWAY };
	struct sockaddr_in gateway = address_of(GATEWAY), any = address_of("0.0.0.0");
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

/* ---- module and device --------------------------------------------------------------------- */

/* Collects the module's parameters from the kernel's command line: kcov_bridge.NAME=VALUE. */
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

const char *set_up_device(const char **what, char *why, size_t size)
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
