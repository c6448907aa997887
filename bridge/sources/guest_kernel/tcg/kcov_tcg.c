// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * kcov_tcg: a QEMU plugin that does for a kernel built without CONFIG_KCOV what the calls of
 * __sanitizer_cov_trace_pc() do in one built with it.
 *
 * Each block of kernel code that a vCPU executes comes by block_runs(). If the task that runs owns
 * an instance, and is in its own kernel context, the block's PC goes into the instance's area, at
 * once and in order, as in kernel/kcov.c. Who owns what stands in the plan (plan.h), which the
 * bridge writes; which task runs, and whether in an interrupt, is read from the guest's own
 * per-CPU variables current_task and preempt_count, as the kernel itself reads them.
 *
 * While nobody traces, nothing is watched: QEMU translates as it does without a plugin. Once there
 * is an owner the guest's module lets its vCPU halt, and all code is translated anew, to be watched;
 * the module sees that from what its marker does then.
 *
 * Where QEMU has the guest's memory follows from the marker as well: the module says where in that
 * memory it is, and QEMU where it reads the code of an instruction from.
 *
 * Arguments: plan=FD,region=FD, inherited from the bridge.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "plan.h"
#include "qemu_plugin_api.h"

#define likely(x)	__builtin_expect(!!(x), 1)
#define unlikely(x)	__builtin_expect(!!(x), 0)

#define KERNEL_START	0xffff800000000000ULL

/* include/linux/preempt.h; what in_task() looks at. */
#define HARD_OR_NMI	0x00ff0000U
#define SERVING_SOFTIRQ	0x00000100U

#define DEPTH		16
#define BUCKETS		(1U << 18)

/* A NOP that nobody else writes: nopl 0x766f636b(%rax); kb_marker() in guest/module. */
static const uint8_t marker[] = { 0x0f, 0x1f, 0x80, 'k', 'c', 'o', 'v' };

enum block_flags {
	/* The last instruction goes elsewhere: what follows is a block of its own. */
	ENDS		= 1,
	/* The last instruction repeats itself, and is translated as a jump to itself. */
	REPEATS		= 2,
	/* A single instruction that QEMU may carry out alone, with all other vCPUs stopped. */
	ALONE		= 4,
	RECORD		= 8,
	NOINSTR		= 16,
	INTERRUPT	= 32,
	EXCEPTION	= 64,
	SYSCALL		= 128,
	RETURNS		= 256,	/* from interrupt or exception: iret */
	SWITCHES	= 512,
	SWITCHED	= 1024,
	CALLS_SWITCH	= 2048,
	LEAVES		= 4096,
	COUNTS		= 8192,
	AFTER_SWITCH	= 16384,
	EXIT_WORK	= 32768,
	EXIT_DONE	= 65536,
	SPECIAL		= NOINSTR | INTERRUPT | EXCEPTION | SYSCALL | RETURNS | SWITCHES |
			  SWITCHED | CALLS_SWITCH | LEAVES | COUNTS |
			  AFTER_SWITCH | EXIT_WORK | EXIT_DONE,
};

/*
 * A translated piece of kernel code. Never freed, and found again when it is translated again. One
 * cache line.
 */
struct block {
	struct block *next;
	uint64_t start, last, end;	/* last: its last instruction */
	uint64_t pc;			/* canonical */
	uint64_t number;
	uint32_t flags;
	atomic_bool seen;
} __attribute__((aligned(64)));

enum interrupt {
	NONE,
	/* Begun, and not yet counted in preempt_count. */
	ENTERED,
	COUNTED,
	/* Not counted any more; ends when the code around the handler goes on. */
	LEAVING,
};

/* What a slot's owner is about. Touched by the vCPU that runs the owner. */
struct owner {
	struct plan_slot *slot;
	_Atomic uint64_t *hidden;
	/* The slot's area as of the vCPU's epoch, inside the region: NULL: none. */
	uint64_t *area, *bitmap;
	uint64_t most, half, bitmap_bits;
	/* The block before, in this task and context. */
	const struct block *before;
	bool resumed;
	/* In __schedule(). */
	bool scheduling;
	/* In a context switch: Linux' KCOV_IN_CTXSW. */
	bool switching;
	/* Where the call of __schedule() returns to. */
	uint64_t switched;
	enum interrupt interrupt;
	/* What interrupts and exceptions broke into, innermost last. */
	struct {
		const struct block *block;
		/* What owner.interrupt was. */
		enum interrupt outer;
		bool interrupt;
	} broken[DEPTH];
	unsigned int depth;
	uint64_t task;
};

struct vcpu {
	const volatile uint64_t *current;
	const volatile uint32_t *preempt;
	uint64_t epoch;
	uint64_t task;
	struct owner *owner;
} __attribute__((aligned(64)));

static struct plan_header *plan;
static struct plan_cpu *cpus;
static struct plan_slot *slots;
static struct plan_block *blocks;
static uint8_t *region;
static uint64_t region_bytes;
/* Set once, under translation. */
static _Atomic(uint8_t *) guest_memory;

static struct vcpu vcpus[PLAN_CPUS];
static struct owner owners[PLAN_SLOTS];

static qemu_plugin_id_t plugin_id;
static bool insn_data_copies;
static any_cb trans_cb;
/* The bridge uses membarrier(2), and it concerns this process. */
static bool expedited;
static void *insn_data_symbol;

/* Guards what follows: translation happens on every vCPU. */
static pthread_mutex_t translation = PTHREAD_MUTEX_INITIALIZER;
static struct block *buckets[BUCKETS];
static uint64_t n_blocks;
static struct plan_range *ranges;
static uint64_t n_ranges, ranges_epoch;
static uint64_t vectors[PLAN_VECTORS];
/* Where calls of __schedule() return to, in schedule() and a few for preemption, in this kernel. */
static uint64_t after_switch[16], syscall_entry;

/* The version of the plugin API whose callbacks have no id of the plugin any more. */
#define API_WITHOUT_ID	7

#ifdef PLUGIN_API
/* No symbol tells this version from the one before: the bridge knows what QEMU asks for. */
EXPORTED int qemu_plugin_version = PLUGIN_API;
#else
/*
 * QEMU reads this after it has loaded the file, so the constructor below can still choose. A QEMU may
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

	/* Old names that went away with version 2. */
	if (!dlsym(RTLD_DEFAULT, "qemu_plugin_n_vcpus"))
		for (size_t i = 0; i < sizeof(since) / sizeof(since[0]); i++)
			if (dlsym(RTLD_DEFAULT, since[i].symbol))
				qemu_plugin_version = since[i].version;
}
#endif

/* ---- the bridge's words -------------------------------------------------------------------- */

static inline uint64_t load(const uint64_t *word)
{
	return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline void store(uint64_t *word, uint64_t value)
{
	__atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static const void *in_ram(uint64_t offset, size_t bytes)
{
	const uint8_t *ram = atomic_load(&guest_memory);

	if (!ram || offset > plan->ram_bytes - bytes || offset % bytes)
		return NULL;
	return ram + offset;
}

/* Whether all of this memory of QEMU's is there to be read. */
static bool is_mapped(uintptr_t start, uintptr_t end)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	unsigned long from, to;
	char line[512], mode;

	if (!maps)
		return false;
	/* Sorted by address. */
	while (start < end && fgets(line, sizeof(line), maps))
		if (sscanf(line, "%lx-%lx %c", &from, &to, &mode) == 3 && mode == 'r' &&
		    from <= start && start < to)
			start = to;
	fclose(maps);
	return start >= end;
}

/*
 * The guest's memory, from where QEMU reads the marker at @address. What the guest says of where
 * it is may be a lie: what is found is used only if it is memory from end to end. Under translation.
 */
static void find_ram(const struct qemu_plugin_insn *insn, uint64_t address)
{
	uint64_t offset = address - plan->marker, at = load(&plan->marker_offset);
	uintptr_t here = (uintptr_t)qemu_plugin_insn_haddr(insn);
	bool found = false;

	if (atomic_load(&guest_memory) || offset >= PLAN_MARKER_BYTES)
		return;
	if (here && at <= plan->ram_bytes - PLAN_MARKER_BYTES && at + offset <= here) {
		uintptr_t start = here - at - offset;

		found = start % 4096 == 0 && start < UINTPTR_MAX - plan->ram_bytes &&
			is_mapped(start, start + plan->ram_bytes);
		if (found)
			atomic_store(&guest_memory, (uint8_t *)start);
	}
	store(&plan->ram, found ? PLAN_RAM_FOUND : PLAN_RAM_REFUSED);
}

/* ---- recording ----------------------------------------------------------------------------- */

static void first_time(struct block *block)
{
	uint64_t at;

	if (atomic_exchange(&block->seen, true))
		return;
	pthread_mutex_lock(&translation);
	at = plan->blocks;
	if (at < PLAN_BLOCKS) {
		blocks[at].start = block->pc;
		blocks[at].bytes = block->end - block->start;
		store(&plan->blocks, at + 1);
	}
	pthread_mutex_unlock(&translation);
}

/*
 * Has owners report their next return, as coverage_epoch_value() in bridge/device/coverage_epoch.py does: the
 * bridge empties an area that is half full, where it is one that it reads itself. 0: they report each
 * return.
 */
static void announce(void)
{
	uint64_t *epoch = (uint64_t *)(region + plan->coverage_epoch);
	struct timespec now;

	if (!load(epoch))
		return;
	clock_gettime(CLOCK_MONOTONIC, &now);
	store(epoch, ((uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec) << 23 |
			     (uint64_t)getpid() << 1 | 1);
}

/*
 * As Area.append() in bridge/device/region.py: every value from the area is bounded.
 *
 * The bridge takes an area away by changing slot and epoch, and then waits until no vCPU is busy
 * with the slot. So the store to busy must be seen before the epoch is read again. It costs a third
 * of all this to have the processor see to that each time; the bridge makes all threads of QEMU do
 * so when it takes one away (membarrier(2)), where there is such a call.
 *
 * False where the plan has changed since the epoch.
 */
static bool append(unsigned int index, uint64_t epoch, struct owner *owner, struct block *block)
{
	uint64_t busy = (uint64_t)(owner->slot - slots) + 1, count;
	uint64_t *area = owner->area;
	bool same;

	if (likely(expedited)) {
		__atomic_store_n(&cpus[index].busy, busy, __ATOMIC_RELAXED);
		__atomic_signal_fence(__ATOMIC_SEQ_CST);
	} else {
		__atomic_store_n(&cpus[index].busy, busy, __ATOMIC_SEQ_CST);
	}
	same = load(&plan->epoch) == epoch;
	if (unlikely(!same || !area))
		goto out;
	if (owner->bitmap) {
		/* Even numbers are the bridge's. */
		uint64_t number = block->number * 2 + 1;

		if (likely(number < owner->bitmap_bits)) {
			uint64_t *word = &owner->bitmap[number / 64], bit = 1ULL << number % 64;

			if (*word & bit)
				goto out;
			*word |= bit;
		}
	}
	count = __atomic_load_n(&area[0], __ATOMIC_RELAXED);
	if (likely(count < owner->most)) {
		__atomic_store_n(&area[count + 1], block->pc, __ATOMIC_RELAXED);
		__atomic_store_n(&area[0], count + 1, __ATOMIC_RELEASE);
		owner->slot->appended++;
		if (unlikely(count == owner->half))
			announce();
		if (unlikely(!atomic_load_explicit(&block->seen, memory_order_relaxed)))
			first_time(block);
	} else {
		owner->slot->dropped++;
	}
out:
	__atomic_store_n(&cpus[index].busy, 0, __ATOMIC_RELEASE);
	return same;
}

/* Where the owner's area is, as the plan has it now. */
static void find_area(struct owner *owner)
{
	uint64_t at = owner->slot->area, words = owner->slot->words;
	uint64_t bitmap = owner->slot->bitmap_words;

	owner->area = owner->bitmap = NULL;
	if (at % 8 || at > region_bytes || words > (region_bytes - at) / 8 || words < 2 ||
	    bitmap > words - 2)
		return;
	owner->area = (uint64_t *)(region + at) + bitmap;
	owner->most = words - bitmap - 1;
	owner->half = owner->most / 2;
	if (bitmap) {
		owner->bitmap = (uint64_t *)(region + at);
		owner->bitmap_bits = bitmap * 64;
	}
}

/* Another task runs, or the plan has changed: who owns what? */
static void look_up(unsigned int index, struct vcpu *vcpu, uint64_t epoch)
{
	vcpu->owner = NULL;
	/* No plan has the epoch 0: until the memory is found, look again each time. */
	vcpu->epoch = atomic_load(&guest_memory) ? epoch : 0;
	vcpu->current = in_ram(load(&cpus[index].current), 8);
	vcpu->preempt = in_ram(load(&cpus[index].preempt), 4);
	vcpu->task = vcpu->current && vcpu->preempt ? *vcpu->current : 0;
	if (!vcpu->task)
		return;
	for (unsigned int i = 0; i < PLAN_SLOTS && i < load(&plan->slots); i++) {
		struct owner *owner = &owners[i];

		if (load(&slots[i].task) != vcpu->task)
			continue;
		if (owner->task != vcpu->task) {
			*owner = (struct owner) {
				.slot = &slots[i],
				.hidden = (void *)(region + plan->hidden + i * plan->hidden_stride),
				.task = vcpu->task,
			};
		}
		find_area(owner);
		vcpu->owner = owner;
		return;
	}
}

static void break_in(struct owner *owner, bool interrupt)
{
	if (owner->depth < DEPTH) {
		owner->broken[owner->depth].block = owner->before;
		owner->broken[owner->depth].outer = owner->interrupt;
		owner->broken[owner->depth].interrupt = interrupt;
	}
	if (interrupt && owner->interrupt == NONE)
		owner->interrupt = ENTERED;
	owner->depth++;
	owner->before = NULL;
	owner->resumed = false;
}

static void go_back(struct owner *owner)
{
	if (!owner->depth)
		return;
	owner->depth--;
	owner->before = NULL;
	if (owner->depth >= DEPTH)
		return;
	owner->before = owner->broken[owner->depth].block;
	/* An interrupt comes between blocks, an exception in the middle of one. */
	owner->resumed = !owner->broken[owner->depth].interrupt;
	owner->interrupt = owner->broken[owner->depth].outer;
}

/*
 * The work before the owner goes back to user mode, where the guest's module caused it: hidden from
 * where that begins to where it is done.
 */
static void hide_exit_work(struct owner *owner, uint32_t flags)
{
	uint64_t hidden = atomic_load_explicit(owner->hidden, memory_order_relaxed);

	if (flags & (EXIT_DONE | SYSCALL)) {
		if (hidden == PLAN_HIDDEN_EXIT || hidden == PLAN_HIDDEN_EXIT_LATER)
			atomic_store(owner->hidden, PLAN_HIDDEN_NO);
	} else if (flags & EXIT_WORK && hidden == PLAN_HIDDEN_EXIT_LATER) {
		atomic_store(owner->hidden, PLAN_HIDDEN_EXIT);
	}
}

/* What tells own work from that of interrupts, beside preempt_count. */
static void special(struct owner *owner, const struct block *block)
{
	if (block->flags & SYSCALL) {
		owner->interrupt = NONE;
		owner->depth = 0;
		owner->before = NULL;
		owner->resumed = false;
		owner->scheduling = owner->switching = false;
	} else if (block->flags & INTERRUPT) {
		break_in(owner, true);
	} else if (block->flags & EXCEPTION) {
		break_in(owner, false);
	}
	if (block->flags & SWITCHES)
		owner->scheduling = true;
	else if (block->flags & LEAVES && owner->scheduling)
		owner->switching = true;
	else if (block->flags & SWITCHED)
		owner->scheduling = owner->switching = false;
	if (block->flags & CALLS_SWITCH)
		owner->switched = block->end;
	/* The handler was called from code of this kind, and has returned to it. */
	if (owner->interrupt == LEAVING && block->flags & NOINSTR)
		owner->interrupt = NONE;
}

/* Whether @block only goes on with what @before began. */
static bool goes_on(const struct block *before, const struct block *block, bool resumed)
{
	if (!(before->flags & ENDS) && block->start == before->end)
		return true;
	if (before->flags & REPEATS && block->start == before->last)
		return true;
	if (resumed || block->flags & ALONE)
		return block->start >= before->start && block->start < before->end;
	return false;
}

/*
 * A block of interrupts, exceptions and switches, or one that runs during such. Answers whether it
 * is the task's own.
 */
static bool is_own(struct owner *owner, const struct block *block, uint32_t preempt)
{
	if (block->flags & SPECIAL)
		special(owner, block);
	if (owner->scheduling && block->start == owner->switched)
		owner->scheduling = owner->switching = false;
	if (owner->interrupt != NONE) {
		bool counted = preempt & (HARD_OR_NMI | SERVING_SOFTIRQ);

		if (counted)
			owner->interrupt = COUNTED;
		else if (owner->interrupt == COUNTED)
			owner->interrupt = LEAVING;
		if (block->flags & RETURNS)
			go_back(owner);
		return false;
	}
	if (block->flags & RETURNS) {
		go_back(owner);
		return false;
	}
	/* in_task() */
	if (preempt & (HARD_OR_NMI | SERVING_SOFTIRQ))
		return false;
	if (block->flags & (EXIT_WORK | EXIT_DONE | SYSCALL) && !owner->depth && !owner->scheduling)
		hide_exit_work(owner, block->flags);
	/* The way back from an interrupt is not the task's own either. */
	return !(block->flags & NOINSTR && owner->depth && owner->depth <= DEPTH &&
		 owner->broken[owner->depth - 1].interrupt);
}

/* A block of kernel code is about to run, and its task is an owner. */
static void owner_runs(unsigned int index, struct vcpu *vcpu, struct block *block)
{
	struct owner *owner = vcpu->owner;
	const struct block *before;
	uint32_t preempt = *vcpu->preempt;
	bool resumed;

	if (unlikely(block->flags & SPECIAL || owner->scheduling || owner->interrupt != NONE ||
		     preempt & (HARD_OR_NMI | SERVING_SOFTIRQ)) &&
	    !is_own(owner, block, preempt))
		return;
	before = owner->before;
	resumed = owner->resumed;
	owner->before = block;
	owner->resumed = false;
	if (!(block->flags & RECORD) || owner->switching ||
	    atomic_load_explicit(owner->hidden, memory_order_relaxed) & PLAN_HIDDEN_MASK)
		return;
	if (before && unlikely(goes_on(before, block, resumed)))
		return;
	while (unlikely(!append(index, vcpu->epoch, owner, block))) {
		look_up(index, vcpu, load(&plan->epoch));
		if (vcpu->owner != owner)
			return;
	}
}

static __attribute__((noinline))
void another_runs(unsigned int index, struct vcpu *vcpu, struct block *block)
{
	look_up(index, vcpu, load(&plan->epoch));
	if (vcpu->owner)
		owner_runs(index, vcpu, block);
}

/* Before each execution of a block of kernel code. */
static void block_runs(unsigned int index, void *block)
{
	struct vcpu *vcpu = &vcpus[index];

	if (unlikely(load(&plan->epoch) != vcpu->epoch ||
		     (vcpu->current && *vcpu->current != vcpu->task)))
		another_runs(index, vcpu, block);
	else if (vcpu->owner)
		owner_runs(index, vcpu, block);
}

/* ---- translation --------------------------------------------------------------------------- */

/* The bridge's ranges and vectors, if they have changed. Under translation. */
static void read_ranges(void)
{
	const struct plan_range *from = (void *)((uint8_t *)plan + PLAN_RANGES_OFFSET);
	uint64_t epoch = load(&plan->ranges_epoch), n;

	if (epoch == ranges_epoch || epoch & 1)
		return;
	n = plan->ranges;
	if (n > PLAN_RANGES)
		n = PLAN_RANGES;
	memcpy(ranges, from, n * sizeof(*ranges));
	memcpy(vectors, (uint8_t *)plan + PLAN_VECTORS_OFFSET, sizeof(vectors));
	if (syscall_entry != plan->syscall_entry)
		memset(after_switch, 0, sizeof(after_switch));
	syscall_entry = plan->syscall_entry;
	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	/* Written meanwhile: the epoch is another by now, so it is read again. */
	n_ranges = n;
	ranges_epoch = epoch;
}

static const struct plan_range *range_of(uint64_t address)
{
	uint64_t low = 0, high = n_ranges;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (address >= ranges[middle].end)
			low = middle + 1;
		else if (address < ranges[middle].start)
			high = middle;
		else
			return &ranges[middle];
	}
	return NULL;
}

/* Whether the instruction before @end is a call of __schedule(). Under translation. */
static bool calls_switch(uint64_t end, const uint8_t *code, size_t size)
{
	const struct plan_range *range;
	int32_t distance;

	if (size != 5 || code[0] != 0xe8)
		return false;
	memcpy(&distance, code + 1, sizeof(distance));
	range = range_of(end + distance);
	return range && range->flags & PLAN_SWITCHES && range->start == end + distance;
}

/* Whether calls of __schedule() return to @address; with @add: from now on. Under translation. */
static bool is_after_switch(uint64_t address, bool add)
{
	for (size_t i = 0; i < sizeof(after_switch) / sizeof(after_switch[0]); i++) {
		if (!after_switch[i] && add)
			after_switch[i] = address;
		if (!after_switch[i] || after_switch[i] == address)
			return after_switch[i];
	}
	return false;
}

static size_t insn_data(const struct qemu_plugin_insn *insn, uint8_t *to, size_t most)
{
	size_t size = qemu_plugin_insn_size(insn);

	if (size > most)
		size = most;
	if (insn_data_copies)
		return ((insn_data_3)insn_data_symbol)(insn, to, size);
	memcpy(to, ((insn_data_1)insn_data_symbol)(insn), size);
	return size;
}

static bool is_prefix(uint8_t byte)
{
	switch (byte) {
	case 0x26: case 0x2e: case 0x36: case 0x3e: case 0x64: case 0x65: case 0x66: case 0x67:
	case 0xf0: case 0xf2: case 0xf3:
		return true;
	default:
		return byte >= 0x40 && byte <= 0x4f;
	}
}

/* What an instruction is to us: opcode map of the Intel manual, volume 2, appendix A. */
static uint32_t classify(const uint8_t *code, size_t size)
{
	bool repeat = false, lock = false;
	size_t i = 0;
	uint8_t op;

	for (; i < size && is_prefix(code[i]); i++) {
		repeat |= code[i] == 0xf2 || code[i] == 0xf3;
		lock |= code[i] == 0xf0;
	}
	if (i == size)
		return 0;
	op = code[i];
	if (op == 0x0f && i + 1 < size) {
		op = code[i + 1];
		if (op >= 0x80 && op <= 0x8f)
			return ENDS;
		if (op == 0x05 || op == 0x07 || op == 0x34 || op == 0x35 || op == 0x0b || op == 0xb9)
			return ENDS;
		/* cmpxchg8b, cmpxchg16b */
		return lock || op == 0xc7 ? ALONE : 0;
	}
	if ((op >= 0x70 && op <= 0x7f) || (op >= 0xe0 && op <= 0xe3))
		return ENDS;
	if (op == 0xcf)
		return ENDS | RETURNS;
	if (op == 0xc2 || op == 0xc3 || (op >= 0xca && op <= 0xcd) || op == 0xe8 || op == 0xe9 ||
	    op == 0xeb)
		return ENDS;
	if (op == 0xff && i + 1 < size && (code[i + 1] >> 3 & 7) >= 2 && (code[i + 1] >> 3 & 7) <= 5)
		return ENDS;
	if (repeat && ((op >= 0xa4 && op <= 0xa7) || (op >= 0xaa && op <= 0xaf) ||
		       (op >= 0x6c && op <= 0x6f)))
		return REPEATS;
	return lock ? ALONE : 0;
}

static uint32_t vector_flags(uint64_t address)
{
	for (unsigned int i = 0; i < PLAN_VECTORS; i++)
		if (vectors[i] == address)
			return i < 32 ? EXCEPTION : i == 0x80 ? SYSCALL : INTERRUPT;
	return 0;
}

/* The block from start to end, new or as before. Under translation. */
static struct block *intern(const struct block *wanted)
{
	uint64_t hash = (wanted->start ^ wanted->end << 20) * 0x9e3779b97f4a7c15;
	struct block **bucket = &buckets[hash >> 46];
	struct block *block;

	for (block = *bucket; block; block = block->next)
		if (block->start == wanted->start && block->end == wanted->end &&
		    block->last == wanted->last && block->pc == wanted->pc &&
		    block->flags == wanted->flags)
			return block;
	if (n_blocks == PLAN_BLOCKS)
		return NULL;
	block = aligned_alloc(_Alignof(struct block), sizeof(*block));
	if (!block)
		return NULL;
	*block = *wanted;
	block->number = n_blocks++;
	block->next = *bucket;
	*bucket = block;
	plan->translated = n_blocks;
	return block;
}

static void reset_done(void);

/* Begins or ends to watch, if the bridge wants that; on a vCPU's thread. */
static void follow_plan(void)
{
	static atomic_bool resetting;

	if (load(&plan->want) == load(&plan->have))
		atomic_store(&resetting, false);
	else if (!atomic_exchange(&resetting, true))
		qemu_plugin_reset(plugin_id, reset_done, NULL);
}

/* All code that runs from here on is watched: tell the owner. */
static void marker_runs(unsigned int index, void *data)
{
	struct vcpu *vcpu = &vcpus[index];

	(void)data;
	look_up(index, vcpu, load(&plan->epoch));
	if (vcpu->owner)
		atomic_store(vcpu->owner->hidden, PLAN_HIDDEN_SEEN);
}

static void vcpu_idles(void)
{
	follow_plan();
}

static void translates(struct qemu_plugin_tb *tb)
{
	uint64_t start = qemu_plugin_tb_vaddr(tb);
	size_t n = qemu_plugin_tb_n_insns(tb);
	const struct plan_range *range;
	const struct qemu_plugin_insn *last;
	struct block block = { .start = start };
	struct block *found = NULL;
	uint8_t code[15];
	size_t size;

	if (start < KERNEL_START || !n)
		return;
	size = insn_data(qemu_plugin_tb_get_insn(tb, 0), code, sizeof(code));
	if (size == sizeof(marker) && !memcmp(code, marker, sizeof(marker))) {
		pthread_mutex_lock(&translation);
		find_ram(qemu_plugin_tb_get_insn(tb, 0), start);
		pthread_mutex_unlock(&translation);
		qemu_plugin_register_vcpu_tb_exec_cb(tb, marker_runs, QEMU_PLUGIN_CB_NO_REGS, NULL);
	}

	last = qemu_plugin_tb_get_insn(tb, n - 1);
	block.last = qemu_plugin_insn_vaddr(last);
	block.end = block.last + qemu_plugin_insn_size(last);
	size = insn_data(last, code, sizeof(code));
	block.flags = classify(code, size);
	if (n != 1)
		block.flags &= ~ALONE;

	pthread_mutex_lock(&translation);
	read_ranges();
	range = range_of(start);
	if (range) {
		block.pc = start + range->delta;
		block.flags |= range->flags & PLAN_RECORD ? RECORD : 0;
		block.flags |= range->flags & PLAN_NOINSTR ? NOINSTR : 0;
		block.flags |= range->flags & PLAN_SWITCHED ? SWITCHED : 0;
		if (range->flags & PLAN_SWITCHES && start == range->start)
			block.flags |= SWITCHES;
		if (range->flags & PLAN_LEAVES && start == range->start)
			block.flags |= LEAVES;
		block.flags |= range->flags & PLAN_COUNTS ? COUNTS : 0;
		block.flags |= range->flags & PLAN_EXIT_WORK ? EXIT_WORK : 0;
		block.flags |= range->flags & PLAN_EXIT_DONE ? EXIT_DONE : 0;
		if (calls_switch(block.end, code, size)) {
			block.flags |= CALLS_SWITCH;
			is_after_switch(block.end, true);
		}
		if (is_after_switch(start, false))
			block.flags |= AFTER_SWITCH;
		block.flags |= start == plan->syscall_entry ? SYSCALL : vector_flags(start);
		/*
		 * What is not recorded need not be seen: nothing goes on with it, for it is other
		 * functions than what is recorded.
		 */
		if (block.flags & (RECORD | SPECIAL)) {
			found = intern(&block);
			if (!found)
				plan->blocks_lost++;
		}
	}
	pthread_mutex_unlock(&translation);
	if (found)
		qemu_plugin_register_vcpu_tb_exec_cb(tb, block_runs, QEMU_PLUGIN_CB_NO_REGS, found);
}

static void translates_with_id(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	(void)id;
	translates(tb);
}

static void reset_done(void)
{
	store(&plan->have, load(&plan->want));
	store(&plan->resets, plan->resets + 1);
	for (unsigned int i = 0; i < PLAN_SLOTS; i++)
		owners[i].task = 0;
	for (unsigned int i = 0; i < PLAN_CPUS; i++)
		vcpus[i].epoch = 0;
	if (plan->have)
		qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, trans_cb, NULL);
	qemu_plugin_register_vcpu_idle_cb(plugin_id, vcpu_idles, NULL);
	follow_plan();
}

/* ---- beginning ----------------------------------------------------------------------------- */

static void *map(const char *value, uint64_t *bytes)
{
	struct stat status;
	void *memory;
	int fd = atoi(value);

	if (fstat(fd, &status) || !status.st_size)
		return NULL;
	*bytes = status.st_size;
	memory = mmap(NULL, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	return memory == MAP_FAILED ? NULL : memory;
}

static int refuse(const char *why)
{
	fprintf(stderr, "kcov_tcg: %s\n", why);
	return 1;
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	uint64_t plan_bytes = 0;

	for (int i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "plan=", 5))
			plan = map(argv[i] + 5, &plan_bytes);
		else if (!strncmp(argv[i], "region=", 7))
			region = map(argv[i] + 7, &region_bytes);
	}
	if (!info->system_emulation || strcmp(info->target_name, "x86_64"))
		return refuse("made for qemu-system-x86_64 alone");
	if (!plan || !region)
		return refuse("the bridge starts it: plan=FD,region=FD");
	if (plan_bytes < PLAN_BYTES || plan->magic != PLAN_MAGIC || plan->version != PLAN_VERSION)
		return refuse("the plan is of another version of the bridge");
	if (plan->hidden > region_bytes || plan->hidden % 8 || plan->hidden_stride % 8 ||
	    plan->hidden_stride > (region_bytes - plan->hidden) / PLAN_SLOTS ||
	    plan->ram_bytes < 4096)
		return refuse("the plan does not fit the region");
	ranges = calloc(PLAN_RANGES, sizeof(*ranges));
	insn_data_symbol = dlsym(RTLD_DEFAULT, "qemu_plugin_insn_data");
	if (!ranges || !insn_data_symbol)
		return refuse("out of memory, or not loaded by QEMU");
	insn_data_copies = qemu_plugin_version >= 3;
	trans_cb = info->version.cur >= API_WITHOUT_ID ? (any_cb)translates :
							 (any_cb)translates_with_id;
	cpus = (void *)((uint8_t *)plan + PLAN_CPUS_OFFSET);
	slots = (void *)((uint8_t *)plan + PLAN_SLOTS_OFFSET);
	blocks = (void *)((uint8_t *)plan + PLAN_BLOCKS_OFFSET);
	plugin_id = id;
	expedited = plan->barriers &&
		    !syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0);
	store(&plan->expedited, expedited);
	store(&plan->api, info->version.cur);
	qemu_plugin_register_vcpu_idle_cb(id, vcpu_idles, NULL);
	return 0;
}
