/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The part of QEMU's plugin API that kcov_tcg.c uses. Distributions ship QEMU without the header,
 * so its functions are declared here (include/qemu/qemu-plugin.h, plugins/loader.c in QEMU). Two
 * functions differ between the API versions from 1 (QEMU 4.2) to 7 (QEMU 11.1):
 *
 * - qemu_plugin_insn_data() copies from version 3 on;
 * - from version 7 on, callbacks get the plugin's data after all other arguments, and no longer
 *   its id as the first. The data is one more argument of the registration, which older versions
 *   ignore.
 */
#ifndef QEMU_PLUGIN_API_H
#define QEMU_PLUGIN_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORTED __attribute__((visibility("default")))

typedef uint64_t qemu_plugin_id_t;

typedef struct qemu_info_t {
	const char *target_name;
	struct {
		int min;
		int cur;
	} version;
	bool system_emulation;
	union {
		struct {
			int smp_vcpus;
			int max_vcpus;
		} system;
	};
} qemu_info_t;

struct qemu_plugin_tb;
struct qemu_plugin_insn;

enum qemu_plugin_cb_flags {
	QEMU_PLUGIN_CB_NO_REGS,
};

/* A callback whose arguments differ between versions. */
typedef void (*any_cb)(void);
typedef void (*tb_exec_cb)(unsigned int vcpu, void *data);

void qemu_plugin_reset(qemu_plugin_id_t id, any_cb cb, void *data);
void qemu_plugin_register_vcpu_idle_cb(qemu_plugin_id_t id, any_cb cb, void *data);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, any_cb cb, void *data);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, tb_exec_cb cb,
					  enum qemu_plugin_cb_flags flags, void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *insn);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *insn);
/* The address in QEMU's memory that it reads the instruction from; NULL if that is not RAM. */
void *qemu_plugin_insn_haddr(const struct qemu_plugin_insn *insn);

/* The type differs between versions; see insn_data() in kcov_tcg.c. */
typedef const void *(*insn_data_1)(const struct qemu_plugin_insn *insn);
typedef size_t (*insn_data_3)(const struct qemu_plugin_insn *insn, void *to, size_t length);

EXPORTED int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc,
				 char **argv);

#endif
