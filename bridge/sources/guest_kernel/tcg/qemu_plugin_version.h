/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The version of the plugin API that a plugin says it is written for: that of the QEMU that loads
 * it, as far as its symbols tell. To be included by one file of each plugin.
 */
#ifndef QEMU_PLUGIN_VERSION_H
#define QEMU_PLUGIN_VERSION_H

#include <dlfcn.h>
#include <stddef.h>

#include "qemu_plugin_api.h"

#ifdef PLUGIN_API
/* No symbol tells this version from the previous one; the bridge knows what QEMU requires. */
EXPORTED int qemu_plugin_version = PLUGIN_API;
#else
/*
 * QEMU reads this after it has loaded the file, so the constructor below can still set it. QEMU may
 * refuse old versions.
 */
EXPORTED int qemu_plugin_version = 1;

__attribute__((constructor))
static void choose_version(void)
{
	static const struct {
		const char *symbol;
		int version;
	} since[] = {
		{ "qemu_plugin_scoreboard_new", 2 },
		{ "qemu_plugin_register_vcpu_tb_exec_cond_cb", 3 },
		{ "qemu_plugin_read_memory_vaddr", 4 },
		{ "qemu_plugin_write_memory_vaddr", 5 },
		{ "qemu_plugin_register_vcpu_discon_cb", 6 },
	};

	/* Version 2 removed this symbol. */
	if (!dlsym(RTLD_DEFAULT, "qemu_plugin_n_vcpus"))
		for (size_t i = 0; i < sizeof(since) / sizeof(since[0]); i++)
			if (dlsym(RTLD_DEFAULT, since[i].symbol))
				qemu_plugin_version = since[i].version;
}
#endif

#endif
