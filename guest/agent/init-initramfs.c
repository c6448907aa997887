/* SPDX-License-Identifier: Apache-2.0 */
/* kcov-init in the initramfs: from the boot modules to the guest's root. */
#define _GNU_SOURCE
#include "init.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

#define MODULE_LIST "/modules/load"
/* How long the serial port gets to send the last report. */
#define DRAIN_MS 200

/* Reports a fault that ends the boot and powers off; a panic would say less. */
__attribute__((noreturn)) static void fail_boot(const char *what, const char *why)
{
	report_unhealthy(what, why);
	sleep_ms(DRAIN_MS);
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

bool in_initramfs(void)
{
	return !access(MODULE_LIST, F_OK);
}

/* The list has one path per line, dependencies first. A module that fails is logged and skipped:
 * the guest may work without it, and a part that needs it reports its own fault. */
void load_boot_modules(void)
{
	char list[8192], *rest = list, *path;

	read_text(MODULE_LIST, list, sizeof(list));
	while ((path = strsep(&rest, "\n"))) {
		int error = *path ? load_module(path, "") : 0;

		if (error)
			say("%s: %s", path, strerror(error));
	}
}

/* The kernel's own symbols, without those of modules, as a System.map. Debian's kernel package has
 * none, so the image's builder boots the image once to read them. */
void dump_symbols(void)
{
	char line[1024];
	FILE *in = fopen("/proc/kallsyms", "re"), *out = fopen("/dev/vdb", "we");

	if (!in || !out)
		fail_boot("symbols", strerror(errno));
	while (fgets(line, sizeof(line), in))
		if (!strchr(line, '['))
			fputs(line, out);
	fputs("end\n", out);
	if (fflush(out) || fsync(fileno(out)))
		fail_boot("symbols", strerror(errno));
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

/* Finds the virtio disk that holds a squashfs. */
static bool find_disk(char *path, size_t size)
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

/* Copies a tree of directories, files and symbolic links, all owned by root. Closes both
 * descriptors. */
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

/* Deletes a tree, but nothing on other file systems. Closes the descriptor. */
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

void mount_root(void)
{
	char disk[32];

	if (!find_disk(disk, sizeof(disk)))
		fail_boot("disk", "no virtio disk with a squashfs was found");
	mkdir("/lower", 0755);
	mkdir("/root", 0755);
	if (mount(disk, "/lower", "squashfs", MS_RDONLY, NULL))
		fail_boot("disk", strerror(errno));
	if (!mount_at("tmpfs", "/rw", 0, "mode=0755"))
		fail_boot("overlay", "no tmpfs could be mounted for the guest's writes");
	mkdir("/rw/upper", 0755);
	mkdir("/rw/work", 0755);
	if (!copy_tree(open("/layer", O_RDONLY | O_DIRECTORY | O_CLOEXEC),
		       open("/rw/upper", O_RDONLY | O_DIRECTORY | O_CLOEXEC)))
		fail_boot("layer", "the agent's files could not be copied out of the initramfs");
	if (mount("overlay", "/root", "overlay", 0,
		  "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work"))
		fail_boot("overlay", strerror(errno));
}

void switch_root(void)
{
	struct stat initramfs;
	int old_root;

	if (mount("/proc", "/root/proc", NULL, MS_MOVE, NULL) ||
	    mount("/sys", "/root/sys", NULL, MS_MOVE, NULL) ||
	    mount("/dev", "/root/dev", NULL, MS_MOVE, NULL))
		fail_boot("root", strerror(errno));
	old_root = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (chdir("/root") || fstat(old_root, &initramfs))
		fail_boot("root", strerror(errno));
	/* This frees the initramfs's memory. */
	delete_tree(old_root, initramfs.st_dev);
	if (mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
		fail_boot("root", strerror(errno));
	execl(SELF, "kcov-init", (char *)NULL);
	fail_boot("root", "the root file system has no " SELF);
}
