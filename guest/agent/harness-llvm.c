/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The harness `llvm`: LLVMFuzzerTestOneInput, as libFuzzer calls it.
 *
 *	llvm PATH [ARGUMENT]...		of a shared object
 *	llvm [ARGUMENT]...		linked with it (compiled with HARNESS_LINKED)
 *
 * LLVMFuzzerInitialize, if it is there, gets the arguments, once, before any child.
 */
#define _GNU_SOURCE
#include "harness.h"
#include "scratch.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static int (*test_one_input)(const uint8_t *data, size_t length);
static int (*initialize)(int *argc, char ***argv);

#ifdef HARNESS_LINKED
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length);
int __attribute__((weak)) LLVMFuzzerInitialize(int *argc, char ***argv);

static int find(const char *path)
{
	(void)path;
	test_one_input = LLVMFuzzerTestOneInput;
	initialize = LLVMFuzzerInitialize;
	return 0;
}
#else
static int find(const char *path)
{
	void *object = path ? dlopen(path, RTLD_NOW | RTLD_GLOBAL) : NULL;

	if (object) {
		*(void **)&test_one_input = dlsym(object, "LLVMFuzzerTestOneInput");
		*(void **)&initialize = dlsym(object, "LLVMFuzzerInitialize");
	}
	if (test_one_input)
		return 0;
	fprintf(stderr, "llvm: %s\n", path ? dlerror() : "no shared object");
	return 1;
}
#endif

static int load(int argc, char **argv)
{
	if (find(argc > 1 ? argv[1] : NULL))
		return 1;
	if (initialize && initialize(&argc, &argv)) {
		fprintf(stderr, "llvm: LLVMFuzzerInitialize failed\n");
		return 1;
	}
	return 0;
}

static int run(const uint8_t *data, size_t length)
{
	/* What it returns says whether a corpus should keep the case; the engine decides that here. */
	test_one_input(data, length);
	return 0;
}

static void clean(void)
{
	scratch_clean(true);
}

RUNNER_HARNESS(llvm) = {
	.name = "llvm",
	.load = load,
	.begin = scratch_begin,
	.run = run,
	.clean = clean,
};

/*
 * What code that was compiled with -fsanitize=fuzzer-no-link calls. The guest's coverage is kcov's,
 * so they do nothing; a runtime of the code's own goes first.
 */
#define UNUSED_COUNTER(name, ...)                                                                  \
	__attribute__((weak, visibility("default"))) void name(__VA_ARGS__);                       \
	void name(__VA_ARGS__)                                                                     \
	{                                                                                          \
	}

#pragma GCC diagnostic ignored "-Wunused-parameter"
UNUSED_COUNTER(__sanitizer_cov_trace_pc, void)
UNUSED_COUNTER(__sanitizer_cov_trace_pc_guard, uint32_t *guard)
UNUSED_COUNTER(__sanitizer_cov_trace_pc_guard_init, uint32_t *start, uint32_t *stop)
UNUSED_COUNTER(__sanitizer_cov_8bit_counters_init, char *start, char *stop)
UNUSED_COUNTER(__sanitizer_cov_pcs_init, const uintptr_t *start, const uintptr_t *stop)
UNUSED_COUNTER(__sanitizer_cov_trace_pc_indir, uintptr_t callee)
UNUSED_COUNTER(__sanitizer_cov_trace_cmp1, uint8_t a, uint8_t b)
UNUSED_COUNTER(__sanitizer_cov_trace_cmp2, uint16_t a, uint16_t b)
UNUSED_COUNTER(__sanitizer_cov_trace_cmp4, uint32_t a, uint32_t b)
UNUSED_COUNTER(__sanitizer_cov_trace_cmp8, uint64_t a, uint64_t b)
UNUSED_COUNTER(__sanitizer_cov_trace_const_cmp1, uint8_t a, uint8_t b)
UNUSED_COUNTER(__sanitizer_cov_trace_const_cmp2, uint16_t a, uint16_t b)
UNUSED_COUNTER(__sanitizer_cov_trace_const_cmp4, uint32_t a, uint32_t b)
UNUSED_COUNTER(__sanitizer_cov_trace_const_cmp8, uint64_t a, uint64_t b)
UNUSED_COUNTER(__sanitizer_cov_trace_switch, uint64_t value, void *cases)
UNUSED_COUNTER(__sanitizer_cov_trace_div4, uint32_t value)
UNUSED_COUNTER(__sanitizer_cov_trace_div8, uint64_t value)
UNUSED_COUNTER(__sanitizer_cov_trace_gep, uintptr_t index)
