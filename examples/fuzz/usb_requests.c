/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A harness: the bytes of a case are requests to a USB device, made by the kernel's usbfs.
 *
 *	cc -shared -fPIC -O2 -o usb_requests.so usb_requests.c
 *
 * A record is a byte and what it announces, with numbers in little endian:
 *	low two bits 0, 1: a control request: the setup packet of 8 bytes, and if it goes out as
 *		many bytes as its length says
 *	2: bytes for a bulk endpoint, whose number is in the bits 2-5: length (2 bytes), bytes
 *	3: read from a bulk endpoint, in the same bits: length (2 bytes)
 * What is missing at the end of a case is left out.
 */
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/usb/ch9.h>
#include <linux/usbdevice_fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* All time-outs of a case together are far from the limit of a case. */
enum { TIMEOUT_MS = 10, REQUESTS = 32, LARGEST = 4096, INTERFACES = 6 };

static const char vendor[] = "1209";
static int device = -1;
static uint8_t buffer[LARGEST];

static int read_text(const char *directory, const char *name, char *text, size_t size)
{
	char path[256];
	ssize_t length;
	int fd;

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	length = read(fd, text, size - 1);
	close(fd);
	text[length > 0 ? length : 0] = 0;
	return length > 0 ? 0 : -1;
}

static int open_device(void)
{
	char text[16], path[64];
	glob_t found;
	int fd = -1;

	if (glob("/sys/bus/usb/devices/*", 0, NULL, &found))
		return -1;
	for (size_t i = 0; i < found.gl_pathc && fd < 0; i++) {
		int bus, number;

		if (read_text(found.gl_pathv[i], "idVendor", text, sizeof(text)) ||
		    strncmp(text, vendor, strlen(vendor)))
			continue;
		if (read_text(found.gl_pathv[i], "busnum", text, sizeof(text)))
			continue;
		bus = atoi(text);
		if (read_text(found.gl_pathv[i], "devnum", text, sizeof(text)))
			continue;
		number = atoi(text);
		snprintf(path, sizeof(path), "/dev/bus/usb/%03d/%03d", bus, number);
		fd = open(path, O_RDWR | O_CLOEXEC);
	}
	globfree(&found);
	for (unsigned int each = 0; fd >= 0 && each < INTERFACES; each++)
		ioctl(fd, USBDEVFS_CLAIMINTERFACE, &each);
	return fd;
}

static void control(const uint8_t *setup, const uint8_t *data)
{
	uint16_t length = (uint16_t)(setup[6] | setup[7] << 8);
	struct usbdevfs_ctrltransfer request = {
		.bRequestType = setup[0],
		.bRequest = setup[1],
		.wValue = (uint16_t)(setup[2] | setup[3] << 8),
		.wIndex = (uint16_t)(setup[4] | setup[5] << 8),
		.wLength = length < LARGEST ? length : LARGEST,
		.timeout = TIMEOUT_MS,
		.data = buffer,
	};

	if (!(setup[0] & USB_DIR_IN))
		memcpy(buffer, data, request.wLength);
	ioctl(device, USBDEVFS_CONTROL, &request);
}

static void bulk(unsigned int endpoint, unsigned int length)
{
	struct usbdevfs_bulktransfer request = {
		.ep = endpoint,
		.len = length,
		.timeout = TIMEOUT_MS,
		.data = buffer,
	};

	ioctl(device, USBDEVFS_BULK, &request);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	size_t at = 0;

	if (device < 0)
		device = open_device();
	for (int i = 0; i < REQUESTS && size - at >= 3; i++) {
		uint8_t kind = data[at++];
		unsigned int endpoint = kind >> 2 & 15, length;

		if ((kind & 3) < 2) {
			if (size - at < 8)
				break;
			length = data[at] & USB_DIR_IN ? 0 : data[at + 6] | data[at + 7] << 8;
			if (length > LARGEST || size - at - 8 < length)
				break;
			control(data + at, data + at + 8);
			at += 8 + length;
			continue;
		}
		length = data[at] | data[at + 1] << 8;
		at += 2;
		if ((kind & 3) == 3) {
			bulk(endpoint | USB_DIR_IN, length < LARGEST ? length : LARGEST);
			continue;
		}
		length = size - at < length ? (unsigned int)(size - at) : length;
		length = length < LARGEST ? length : LARGEST;
		memcpy(buffer, data + at, length);
		bulk(endpoint, length);
		at += length;
	}
	return 0;
}
