// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * kcov_tcg: a QEMU plugin that records PCs of a kernel built without CONFIG_KCOV, as the calls of
 * __sanitizer_cov_trace_pc() do in a kernel built with it.
 *
 * QEMU calls handle_block() before each basic block of kernel code that a vCPU executes. If the
 * current task owns an instance and is in its own kernel context, the plugin appends the block's PC
 * to the instance's area, at once and in order, as kernel/kcov.c does. The bridge writes the owner
 * of each instance to the plan (plan.h). The plugin reads the current task, and whether it is in an
 * interrupt, from the guest's per-CPU variables current_task and preempt_count, as the kernel does.
 *
 * Without an owner the plugin watches no code, and QEMU translates as it does without a plugin.
 * Once there is an owner, the guest's module halts its vCPU, and QEMU translates all code again,
 * with calls of handle_block(). The module learns from the effect of its marker that watching has
 * started.
 *
 * The marker also shows where QEMU keeps the guest's memory: the module reports the marker's offset
 * in that memory, and QEMU reports the address from which it reads the marker's code.
 *
 * If QEMU's own device models were built with coverage (docs/native.md), the plugin appends their
 * blocks too, between those of the kernel code that made a device work: device_runs().
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
#include "qemu_plugin_version.h"

#define likely(x)	__builtin_expect(!!(x), 1)
#define unlikely(x)	__builtin_expect(!!(x), 0)

#define KERNEL_START	0xffff800000000000ULL

/* include/linux/preempt.h: the bits that in_task() tests. */
#define HARD_OR_NMI	0x00ff0000U
#define SERVING_SOFTIRQ	0x00000100U

#define MAX_DEPTH		16
#define BUCKETS		(1U << 18)

/* A NOP that only kb_marker() in guest/module contains: nopl 0x766f636b(%rax). */
static const uint8_t marker[] = { 0x0f, 0x1f, 0x80, 'k', 'c', 'o', 'v' };

enum block_flags {
	/* The last instruction branches, so the code after it is another basic block. */
	BLOCK_ENDS_IN_BRANCH	= 1,
	/* The last instruction repeats, and QEMU translates it as a jump to itself. */
	BLOCK_REPEATS		= 2,
	/* A single instruction that QEMU may execute exclusively, with all other vCPUs stopped. */
	BLOCK_EXCLUSIVE		= 4,
	BLOCK_RECORD		= 8,
	BLOCK_NOINSTR		= 16,
	BLOCK_INTERRUPT		= 32,
	BLOCK_EXCEPTION		= 64,
	BLOCK_SYSCALL		= 128,
	BLOCK_IRET		= 256,	/* returns from an interrupt or exception */
	BLOCK_SCHEDULE		= 512,	/* the start of __schedule() */
	BLOCK_SCHEDULE_END	= 1024,
	BLOCK_CALLS_SCHEDULE	= 2048,
	BLOCK_SWITCH_START	= 4096,
	BLOCK_INTERRUPT_COUNT	= 8192,
	BLOCK_AFTER_SCHEDULE	= 16384,
	BLOCK_EXIT_WORK		= 32768,
	BLOCK_EXIT_DONE		= 65536,
	/* Changes what the task does, in whatever state. */
	BLOCK_SPECIAL		= BLOCK_INTERRUPT | BLOCK_EXCEPTION | BLOCK_SYSCALL | BLOCK_IRET |
				  BLOCK_SCHEDULE | BLOCK_CALLS_SCHEDULE,
	/* Matters if the module caused work before the task returns to user mode. */
	BLOCK_EXIT		= BLOCK_EXIT_WORK | BLOCK_EXIT_DONE,
	/* Matters only in an irregular state, see struct owner. */
	BLOCK_WATCHED		= BLOCK_NOINSTR | BLOCK_SCHEDULE_END | BLOCK_SWITCH_START |
				  BLOCK_INTERRUPT_COUNT | BLOCK_AFTER_SCHEDULE,
};

/*
 * A translated block of kernel code. Never freed; translating the same code again finds it. Half a
 * cache line.
 */
struct block {
	uint64_t start;
	uint64_t pc;		/* canonical */
	uint32_t flags;
	uint32_t next;		/* number of the next block in this bucket; 0: none */
	uint16_t bytes;
	uint16_t last;		/* offset of the last instruction */
	atomic_bool seen;	/* in the plan's table of blocks */
} __attribute__((aligned(32)));

/*
 * What a callback gets: the number of a block times 2, plus 1. This is the block's bit in bitmaps,
 * of which the bridge uses the even ones. Numbers begin with 1; block 0 is none, and all zero.
 */
typedef uintptr_t block_id;

enum interrupt {
	INTERRUPT_NONE,
	/* Entered, but preempt_count does not count it yet. */
	INTERRUPT_ENTERED,
	INTERRUPT_COUNTED,
	/* preempt_count no longer counts it; ends when the code around the handler continues. */
	INTERRUPT_UNCOUNTED,
};

/*
 * The state of a slot's owner. Accessed by the vCPU that runs the owner. What each block needs comes
 * first, in one cache line.
 */
struct owner {
	/*
	 * The number of bits below which a block in the bitmap needs nothing else: bitmap_bits, or 0
	 * while irregular.
	 */
	uint64_t regular_bits;
	/* The slot's bitmap and area in the region as of the vCPU's epoch; &nowhere for no area. */
	uint64_t *bitmap;
	/* The previous block that this task ran, not counting what interrupted it. */
	block_id previous;
	_Atomic uint64_t *hidden;
	/* Some of the state below matters to any next block. */
	bool irregular;
	uint64_t *area;
	uint64_t most, half;

	uint64_t bitmap_bits;
	struct plan_slot *slot;
	uint64_t busy;		/* for plan_cpu.busy */

	/* The code of an interrupted block continues, perhaps in the middle. */
	bool resumed;
	/* In __schedule(). */
	bool scheduling;
	/* In a context switch: Linux' KCOV_IN_CTXSW. */
	bool switching;
	/* The return address of the call of __schedule(). */
	uint64_t schedule_return;
	enum interrupt interrupt;
	/* What interrupts and exceptions interrupted, innermost last. */
	struct {
		block_id block;
		/* The value of owner.interrupt before. */
		enum interrupt outer;
		/* By an interrupt rather than an exception. */
		bool interrupt;
	} interrupted[MAX_DEPTH];
	unsigned int depth;
	uint64_t task, number;
} __attribute__((aligned(64)));

/* The owner of a task that owns nothing. Never written to. */
static struct owner nobody;

/* A vCPU's variables are here until it is known where the guest keeps them. */
static uint64_t nowhere;

struct vcpu {
	/* The plan's epoch in which the other fields were set; 0: set them again. */
	uint64_t epoch;
	const volatile uint64_t *current;
	uint64_t task;
	struct owner *owner;
	const volatile uint32_t *preempt;
	uint64_t *busy;		/* plan_cpu.busy */
} __attribute__((aligned(64)));

static struct plan_header *plan;
static struct plan_cpu *cpus;
static struct plan_slot *slots;
static struct plan_block *blocks;
static uint8_t *region;
static uint64_t region_bytes;
/* Set once, with translation held. */
static _Atomic(uint8_t *) guest_memory;

static struct vcpu vcpus[PLAN_CPUS] = {
	[0 ... PLAN_CPUS - 1] = { .current = &nowhere, .owner = &nobody },
};
static struct owner owners[PLAN_SLOTS];

static qemu_plugin_id_t plugin_id;
static bool insn_data_copies;
static any_cb trans_cb, idle_cb;
/* The bridge calls membarrier(2), and this process is registered for it. */
static bool expedited;
static void *insn_data_symbol;
/* kcov_bridge_take_blocks() in bridge/sources/native/runtime/kcov_bridge.h; NULL in other QEMUs. */
typedef int (*block_taker)(uint64_t pc);
static block_taker (*take_blocks)(block_taker take);
/* That runs on this thread; NULL where it is not known, and on threads of no vCPU. */
static __thread struct vcpu *this_vcpu;

/* Blocks of device models that this thread ran lately, by PC. */
#define KNOWN_DEVICE_BLOCKS	4096
static __thread struct {
	uint64_t pc;
	block_id id;
} device_blocks[KNOWN_DEVICE_BLOCKS];

/* Guards the variables below, because every vCPU translates. */
static pthread_mutex_t translation = PTHREAD_MUTEX_INITIALIZER;
static uint32_t buckets[BUCKETS];
/* Pages take memory once they are used. */
static struct block block_table[PLAN_BLOCKS + 1];
static uint64_t n_blocks;
static struct plan_range *ranges;
static uint64_t n_ranges, ranges_epoch;
static uint64_t vectors[PLAN_VECTORS];
/* Return addresses of this kernel's calls of __schedule(): in schedule(), a few for preemption. */
static uint64_t after_schedule[16], syscall_entry;

/* The first version of the plugin API whose callbacks do not get the plugin's id. */
#define API_WITHOUT_ID	7

/* ---- the bridge's words -------------------------------------------------------------------- */

static inline uint64_t load(const uint64_t *word)
{
	return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline void store(uint64_t *word, uint64_t value)
{
	__atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static const void *guest_word(uint64_t offset, size_t bytes)
{
	const uint8_t *ram = atomic_load(&guest_memory);

	if (!ram || offset > plan->ram_bytes - bytes || offset % bytes)
		return NULL;
	return ram + offset;
}

/* Return whether all of this range of QEMU's memory is readable. */
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
 * Find the guest's memory from the place where QEMU reads the marker at @address. The guest may lie
 * about the marker's offset, so the memory is used only if all of it is readable. Called with
 * translation held.
 */
static void find_guest_memory(const struct qemu_plugin_insn *insn, uint64_t address)
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

static inline struct block *block_of(block_id id)
{
	return &block_table[id / 2];
}

static inline uint64_t block_end(const struct block *block)
{
	return block->start + block->bytes;
}

static void list_block(struct block *block)
{
	uint64_t at;

	if (atomic_exchange(&block->seen, true))
		return;
	pthread_mutex_lock(&translation);
	at = plan->blocks;
	if (at < PLAN_BLOCKS) {
		blocks[at].start = block->pc;
		blocks[at].bytes = block->bytes;
		store(&plan->blocks, at + 1);
	}
	pthread_mutex_unlock(&translation);
}

/*
 * Make owners report their next return, as coverage_epoch_value() in
 * bridge/device/coverage_epoch.py does: the bridge empties a half-full area if it reads that area
 * itself. At 0 owners report each return anyway.
 */
static void change_coverage_epoch(void)
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
 * Append a block's PC to the owner's area, like Area.append() in bridge/device/region.py: every
 * value from the area is bounded.
 *
 * To detach an area the bridge changes slot and epoch, and then waits until no vCPU is busy with
 * the slot. So the store to busy must be visible before the epoch is read again. A full barrier for
 * each PC costs a third of the whole. Instead, if membarrier(2) exists, the bridge makes all
 * threads of QEMU pass a barrier when it detaches an area.
 *
 * Return false if the plan has changed since @epoch.
 */
static bool append(const struct vcpu *vcpu, struct owner *owner, block_id id)
{
	struct block *block = block_of(id);
	uint64_t *area = owner->area, count;
	bool same;

	if (expedited) {
		__atomic_store_n(vcpu->busy, owner->busy, __ATOMIC_RELAXED);
		__atomic_signal_fence(__ATOMIC_SEQ_CST);
	} else {
		__atomic_store_n(vcpu->busy, owner->busy, __ATOMIC_SEQ_CST);
	}
	same = load(&plan->epoch) == vcpu->epoch;
	if (!same || area == &nowhere)
		goto out;
	if (id < owner->bitmap_bits) {
		uint64_t *word = &owner->bitmap[id / 64], bit = 1ULL << id % 64;

		if (*word & bit)
			goto out;
		*word |= bit;
	}
	count = __atomic_load_n(&area[0], __ATOMIC_RELAXED);
	if (count < owner->most) {
		__atomic_store_n(&area[count + 1], block->pc, __ATOMIC_RELAXED);
		__atomic_store_n(&area[0], count + 1, __ATOMIC_RELEASE);
		owner->slot->appended++;
		if (count == owner->half)
			change_coverage_epoch();
		if (!atomic_load_explicit(&block->seen, memory_order_relaxed))
			list_block(block);
	} else {
		owner->slot->dropped++;
	}
out:
	__atomic_store_n(vcpu->busy, 0, __ATOMIC_RELEASE);
	return same;
}

/*
 * Do what append() does, without a bitmap, if nothing but the area changes: the block is in the
 * plan's table, and the area is not half full. Else return false; append() follows.
 */
static inline bool append_at_once(const struct vcpu *vcpu, struct owner *owner,
				  const struct block *block)
{
	uint64_t *area = owner->area, count;

	if (unlikely(!expedited))
		return false;
	__atomic_store_n(vcpu->busy, owner->busy, __ATOMIC_RELAXED);
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	if (unlikely(load(&plan->epoch) != vcpu->epoch))
		return false;
	count = __atomic_load_n(&area[0], __ATOMIC_RELAXED);
	if (unlikely(count == owner->half))
		return false;
	if (likely(count < owner->most)) {
		if (unlikely(!atomic_load_explicit(&block->seen, memory_order_relaxed)))
			return false;
		__atomic_store_n(&area[count + 1], block->pc, __ATOMIC_RELAXED);
		__atomic_store_n(&area[0], count + 1, __ATOMIC_RELEASE);
		owner->slot->appended++;
	} else {
		owner->slot->dropped++;
	}
	__atomic_store_n(vcpu->busy, 0, __ATOMIC_RELEASE);
	return true;
}

static inline void set_irregular(struct owner *owner, bool irregular)
{
	owner->irregular = irregular;
	owner->regular_bits = irregular ? 0 : owner->bitmap_bits;
}

/* Update the owner's area from the plan. */
static void update_area(struct owner *owner)
{
	uint64_t at = owner->slot->area, words = owner->slot->words;
	uint64_t bitmap = owner->slot->bitmap_words;

	owner->area = &nowhere;
	owner->regular_bits = owner->bitmap_bits = owner->most = owner->half = 0;
	if (at % 8 || at > region_bytes || words > (region_bytes - at) / 8 || words < 2 ||
	    bitmap > words - 2)
		return;
	owner->area = (uint64_t *)(region + at) + bitmap;
	owner->most = words - bitmap - 1;
	owner->half = owner->most / 2;
	if (bitmap) {
		owner->bitmap = (uint64_t *)(region + at);
		owner->bitmap_bits = bitmap * 64;
		set_irregular(owner, owner->irregular);
	}
}

/* Find the vCPU's owner again after a change of its task or of the plan. */
static void find_owner(struct vcpu *vcpu, uint64_t epoch)
{
	struct plan_cpu *cpu = &cpus[vcpu - vcpus];

	vcpu->owner = &nobody;
	/* Until the guest's memory is found, look again each time: no plan has the epoch 0. */
	vcpu->epoch = atomic_load(&guest_memory) ? epoch : 0;
	vcpu->current = guest_word(load(&cpu->current), 8);
	vcpu->preempt = guest_word(load(&cpu->preempt), 4);
	vcpu->busy = &cpu->busy;
	if (!vcpu->current || !vcpu->preempt)
		vcpu->current = &nowhere;
	vcpu->task = *vcpu->current;
	if (!vcpu->task)
		return;
	for (unsigned int i = 0; i < PLAN_SLOTS && i < load(&plan->slots); i++) {
		struct owner *owner = &owners[i];

		if (load(&slots[i].task) != vcpu->task)
			continue;
		/* The bridge writes the task after the number. */
		if (owner->task != vcpu->task || owner->number != slots[i].number) {
			*owner = (struct owner) {
				.slot = &slots[i],
				.busy = i + 1,
				.hidden = (void *)(region + plan->hidden + i * plan->hidden_stride),
				.task = vcpu->task,
				.number = slots[i].number,
			};
		}
		update_area(owner);
		vcpu->owner = owner;
		return;
	}
}

/* An interrupt handler starts, or an exception handler. */
static void enter_handler(struct owner *owner, bool interrupt)
{
	if (owner->depth < MAX_DEPTH) {
		owner->interrupted[owner->depth].block = owner->previous;
		owner->interrupted[owner->depth].outer = owner->interrupt;
		owner->interrupted[owner->depth].interrupt = interrupt;
	}
	if (interrupt && owner->interrupt == INTERRUPT_NONE)
		owner->interrupt = INTERRUPT_ENTERED;
	owner->depth++;
	owner->previous = 0;
	owner->resumed = false;
}

static void leave_handler(struct owner *owner)
{
	if (!owner->depth)
		return;
	owner->depth--;
	owner->previous = 0;
	if (owner->depth >= MAX_DEPTH)
		return;
	owner->previous = owner->interrupted[owner->depth].block;
	/* An interrupt arrives between blocks, an exception inside one. */
	owner->resumed = !owner->interrupted[owner->depth].interrupt;
	owner->interrupt = owner->interrupted[owner->depth].outer;
}

/*
 * Hide the work before the owner returns to user mode, from its start to its end, if the guest's
 * module caused it.
 */
static void hide_exit_work(struct owner *owner, uint32_t flags)
{
	uint64_t hidden = atomic_load_explicit(owner->hidden, memory_order_relaxed);

	if (flags & (BLOCK_EXIT_DONE | BLOCK_SYSCALL)) {
		if (hidden == PLAN_HIDDEN_EXIT || hidden == PLAN_HIDDEN_EXIT_LATER)
			atomic_store(owner->hidden, PLAN_HIDDEN_NO);
	} else if (flags & BLOCK_EXIT_WORK && hidden == PLAN_HIDDEN_EXIT_LATER) {
		atomic_store(owner->hidden, PLAN_HIDDEN_EXIT);
	}
}

/* Track what separates the task's own work from interrupts, besides preempt_count. */
static void track_context(struct owner *owner, const struct block *block)
{
	if (block->flags & BLOCK_SYSCALL) {
		owner->interrupt = INTERRUPT_NONE;
		owner->depth = 0;
		owner->previous = 0;
		owner->resumed = false;
		owner->scheduling = owner->switching = false;
	} else if (block->flags & BLOCK_INTERRUPT) {
		enter_handler(owner, true);
	} else if (block->flags & BLOCK_EXCEPTION) {
		enter_handler(owner, false);
	}
	if (block->flags & BLOCK_SCHEDULE)
		owner->scheduling = true;
	else if (block->flags & BLOCK_SWITCH_START && owner->scheduling)
		owner->switching = true;
	else if (block->flags & BLOCK_SCHEDULE_END)
		owner->scheduling = owner->switching = false;
	if (block->flags & BLOCK_CALLS_SCHEDULE)
		owner->schedule_return = block_end(block);
	/* Code of this kind called the handler, which has now returned to it. */
	if (owner->interrupt == INTERRUPT_UNCOUNTED && block->flags & BLOCK_NOINSTR)
		owner->interrupt = INTERRUPT_NONE;
}

/* Return whether @block only continues @previous. */
static inline bool continues_block(const struct block *previous, const struct block *block,
				   bool resumed)
{
	if (block->start == block_end(previous))
		return !(previous->flags & BLOCK_ENDS_IN_BRANCH);
	if (unlikely(previous->flags & BLOCK_REPEATS) &&
	    block->start == previous->start + previous->last)
		return true;
	if (unlikely(resumed || block->flags & BLOCK_EXCLUSIVE))
		return block->start - previous->start < previous->bytes;
	return false;
}

/*
 * Return whether @block is the task's own work. It is a block of interrupts, exceptions or context
 * switches, or runs during one.
 */
static bool is_own_work(struct owner *owner, block_id id, uint32_t preempt)
{
	const struct block *block = block_of(id);

	if (block->flags & (BLOCK_SPECIAL | BLOCK_WATCHED))
		track_context(owner, block);
	if (owner->scheduling && block->start == owner->schedule_return)
		owner->scheduling = owner->switching = false;
	if (owner->interrupt != INTERRUPT_NONE) {
		bool counted = preempt & (HARD_OR_NMI | SERVING_SOFTIRQ);

		if (counted)
			owner->interrupt = INTERRUPT_COUNTED;
		else if (owner->interrupt == INTERRUPT_COUNTED)
			owner->interrupt = INTERRUPT_UNCOUNTED;
		if (block->flags & BLOCK_IRET)
			leave_handler(owner);
		return false;
	}
	if (block->flags & BLOCK_IRET) {
		leave_handler(owner);
		return false;
	}
	/* in_task() */
	if (preempt & (HARD_OR_NMI | SERVING_SOFTIRQ)) {
		owner->previous = id;
		return false;
	}
	if (block->flags & (BLOCK_EXIT_WORK | BLOCK_EXIT_DONE | BLOCK_SYSCALL) && !owner->depth &&
	    !owner->scheduling)
		hide_exit_work(owner, block->flags);
	/* The return path of an interrupt is not the task's own work either. */
	return !(block->flags & BLOCK_NOINSTR && owner->depth && owner->depth <= MAX_DEPTH &&
		 owner->interrupted[owner->depth - 1].interrupt);
}

/* Return whether the owner is on the way out of an interrupt. */
static bool leaves_interrupt(const struct owner *owner)
{
	return owner->depth &&
	       (owner->depth > MAX_DEPTH || owner->interrupted[owner->depth - 1].interrupt);
}

/* Handle a block of kernel code that is about to run in an owner. */
static __attribute__((noinline)) void owner_runs(struct vcpu *vcpu, block_id id)
{
	struct owner *owner = vcpu->owner;
	const struct block *block = block_of(id);
	bool own = is_own_work(owner, id, *vcpu->preempt), resumed = owner->resumed;
	block_id previous = owner->previous;

	if (own) {
		owner->previous = id;
		owner->resumed = false;
	}
	set_irregular(owner, owner->scheduling || owner->interrupt != INTERRUPT_NONE ||
				     owner->resumed || leaves_interrupt(owner));
	if (!own || !(block->flags & BLOCK_RECORD) || owner->switching ||
	    atomic_load_explicit(owner->hidden, memory_order_relaxed) & PLAN_HIDDEN_MASK ||
	    continues_block(block_of(previous), block, resumed))
		return;
	while (!append(vcpu, owner, id)) {
		find_owner(vcpu, load(&plan->epoch));
		if (vcpu->owner != owner)
			return;
	}
}

static __attribute__((noinline)) void block_runs_after_change(struct vcpu *vcpu, block_id id)
{
	find_owner(vcpu, load(&plan->epoch));
	if (vcpu->owner != &nobody)
		owner_runs(vcpu, id);
}

/* Handle a block to record, unless it is in a bitmap and the state is regular. */
static __attribute__((noinline)) void block_runs_anew(struct vcpu *vcpu, block_id id)
{
	struct owner *owner = vcpu->owner;
	const struct block *block = block_of(id), *previous = block_of(owner->previous);

	if (unlikely(owner->irregular))
		return owner_runs(vcpu, id);
	/* The next round of an instruction that repeats. */
	if (id == owner->previous && block->flags & BLOCK_REPEATS && !block->last)
		return;
	if ((block->start != block_end(previous) || previous->flags & BLOCK_ENDS_IN_BRANCH) &&
	    (owner->bitmap || previous->flags & BLOCK_REPEATS || block->flags & BLOCK_EXCLUSIVE ||
	     *vcpu->preempt & (HARD_OR_NMI | SERVING_SOFTIRQ) ||
	     atomic_load_explicit(owner->hidden, memory_order_relaxed) & PLAN_HIDDEN_MASK ||
	     !append_at_once(vcpu, owner, block)))
		owner_runs(vcpu, id);
	else
		owner->previous = id;
}

/*
 * Handle a block of kernel code that is about to run. Hundreds of them run in a system call, so
 * what happens most of the time is done without memory of the block, and in twenty instructions:
 * tasks that own nothing, and blocks that are in a bitmap.
 *
 * @exit: the block is one of BLOCK_EXIT; @record: it is one of BLOCK_RECORD.
 */
static inline __attribute__((always_inline)) void handle_block(unsigned int index, block_id id,
							       bool exit, bool record)
{
	struct vcpu *vcpu = &vcpus[index];
	struct owner *owner;

#ifdef RECORD_NOTHING	/* tests/bench/bench_kernel.py measures what the calls alone cost. */
	return;
#endif
	if (unlikely(load(&plan->epoch) != vcpu->epoch || *vcpu->current != vcpu->task))
		return block_runs_after_change(vcpu, id);
	owner = vcpu->owner;
	if ((exit || !record || id >= owner->regular_bits) && owner == &nobody)
		return;
	if ((exit && atomic_load_explicit(owner->hidden, memory_order_relaxed)) ||
	    (!record && unlikely(owner->irregular)))
		return owner_runs(vcpu, id);
	if (record && (id >= owner->regular_bits || !(owner->bitmap[id / 64] & 1ULL << id % 64)))
		return block_runs_anew(vcpu, id);
	owner->previous = id;
}

/* QEMU calls one of these before each execution of a block of kernel code. */
static void recorded_block_runs(unsigned int index, void *data)
{
	handle_block(index, (block_id)data, false, true);
}

static void watched_block_runs(unsigned int index, void *data)
{
	handle_block(index, (block_id)data, false, false);
}

static void recorded_exit_runs(unsigned int index, void *data)
{
	handle_block(index, (block_id)data, true, true);
}

static void watched_exit_runs(unsigned int index, void *data)
{
	handle_block(index, (block_id)data, true, false);
}

static void special_block_runs(unsigned int index, void *data)
{
	struct vcpu *vcpu = &vcpus[index];

#ifdef RECORD_NOTHING
	return;
#endif
	if (unlikely(load(&plan->epoch) != vcpu->epoch || *vcpu->current != vcpu->task))
		block_runs_after_change(vcpu, (block_id)data);
	else if (vcpu->owner != &nobody)
		owner_runs(vcpu, (block_id)data);
}

/* Return what QEMU is to call before a block with these flags. */
static tb_exec_cb callback_of(uint32_t flags)
{
	if (flags & BLOCK_SPECIAL)
		return special_block_runs;
	if (flags & BLOCK_EXIT)
		return flags & BLOCK_RECORD ? recorded_exit_runs : watched_exit_runs;
	return flags & BLOCK_RECORD ? recorded_block_runs : watched_block_runs;
}

/* ---- translation --------------------------------------------------------------------------- */

/* Copy the bridge's ranges and vectors if they have changed. Called with translation held. */
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
		memset(after_schedule, 0, sizeof(after_schedule));
	syscall_entry = plan->syscall_entry;
	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	/* If the bridge wrote meanwhile, the epoch has changed, and the next call copies again. */
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

/* Return whether the instruction before @end calls __schedule(). Called with translation held. */
static bool calls_schedule(uint64_t end, const uint8_t *code, size_t size)
{
	const struct plan_range *range;
	int32_t distance;

	if (size != 5 || code[0] != 0xe8)
		return false;
	memcpy(&distance, code + 1, sizeof(distance));
	range = range_of(end + distance);
	return range && range->flags & PLAN_SCHEDULE && range->start == end + distance;
}

/*
 * Return whether calls of __schedule() return to @address; @add adds it to the known addresses.
 * Called with translation held.
 */
static bool is_after_schedule(uint64_t address, bool add)
{
	for (size_t i = 0; i < sizeof(after_schedule) / sizeof(after_schedule[0]); i++) {
		if (!after_schedule[i] && add)
			after_schedule[i] = address;
		if (!after_schedule[i] || after_schedule[i] == address)
			return after_schedule[i];
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

/* Return an instruction's block flags: opcode map in the Intel manual, volume 2, appendix A. */
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
			return BLOCK_ENDS_IN_BRANCH;
		if (op == 0x05 || op == 0x07 || op == 0x34 || op == 0x35 || op == 0x0b || op == 0xb9)
			return BLOCK_ENDS_IN_BRANCH;
		/* cmpxchg8b, cmpxchg16b */
		return lock || op == 0xc7 ? BLOCK_EXCLUSIVE : 0;
	}
	if ((op >= 0x70 && op <= 0x7f) || (op >= 0xe0 && op <= 0xe3))
		return BLOCK_ENDS_IN_BRANCH;
	if (op == 0xcf)
		return BLOCK_ENDS_IN_BRANCH | BLOCK_IRET;
	if (op == 0xc2 || op == 0xc3 || (op >= 0xca && op <= 0xcd) || op == 0xe8 || op == 0xe9 ||
	    op == 0xeb)
		return BLOCK_ENDS_IN_BRANCH;
	if (op == 0xff && i + 1 < size && (code[i + 1] >> 3 & 7) >= 2 && (code[i + 1] >> 3 & 7) <= 5)
		return BLOCK_ENDS_IN_BRANCH;
	if (repeat && ((op >= 0xa4 && op <= 0xa7) || (op >= 0xaa && op <= 0xaf) ||
		       (op >= 0x6c && op <= 0x6f)))
		return BLOCK_REPEATS;
	return lock ? BLOCK_EXCLUSIVE : 0;
}

static uint32_t vector_flags(uint64_t address)
{
	for (unsigned int i = 0; i < PLAN_VECTORS; i++)
		if (vectors[i] == address)
			return i < 32	 ? BLOCK_EXCEPTION :
			       i == 0x80 ? BLOCK_SYSCALL :
					   BLOCK_INTERRUPT;
	return 0;
}

/* Return the block that equals @wanted, new or known; 0 for none. Called with translation held. */
static block_id intern(const struct block *wanted)
{
	uint64_t hash = (wanted->start ^ (uint64_t)wanted->bytes << 20) * 0x9e3779b97f4a7c15;
	uint32_t *bucket = &buckets[hash >> 46], number;
	struct block *block;

	for (number = *bucket; number; number = block->next) {
		block = &block_table[number];
		if (block->start == wanted->start && block->bytes == wanted->bytes &&
		    block->last == wanted->last && block->pc == wanted->pc &&
		    block->flags == wanted->flags)
			break;
	}
	if (!number) {
		if (n_blocks == PLAN_BLOCKS)
			return 0;
		number = ++n_blocks;
		block = &block_table[number];
		*block = *wanted;
		block->next = *bucket;
		*bucket = number;
		plan->translated = n_blocks;
	}
	return (block_id)number * 2 + 1;
}

/* Return the block that stands for a PC of QEMU's own device models; 0 for none. */
static block_id device_block(uint64_t pc)
{
	size_t at = pc / 16 % KNOWN_DEVICE_BLOCKS;

	if (device_blocks[at].pc != pc) {
		/* Not in the plan's table of blocks, which is the kernel's. */
		struct block block = { .start = pc, .pc = pc, .seen = true };

		pthread_mutex_lock(&translation);
		device_blocks[at].id = intern(&block);
		if (!device_blocks[at].id)
			plan->blocks_lost++;
		pthread_mutex_unlock(&translation);
		device_blocks[at].pc = pc;
	}
	return device_blocks[at].id;
}

/*
 * A device model runs a block on a vCPU's thread, because the guest's code has accessed the device.
 * Append its PC if that is an owner's own work, as for the kernel's blocks; return whether it is.
 */
static int device_runs(uint64_t pc)
{
	struct vcpu *vcpu = this_vcpu;
	struct owner *owner;
	block_id id;

	do {
		if (load(&plan->epoch) != vcpu->epoch || *vcpu->current != vcpu->task)
			find_owner(vcpu, load(&plan->epoch));
		owner = vcpu->owner;
		if (owner == &nobody || owner->interrupt != INTERRUPT_NONE || owner->switching ||
		    *vcpu->preempt & (HARD_OR_NMI | SERVING_SOFTIRQ) ||
		    atomic_load_explicit(owner->hidden, memory_order_relaxed) & PLAN_HIDDEN_MASK)
			return 0;
		id = device_block(pc);
	} while (id && !append(vcpu, owner, id));
	return id != 0;
}

/* Take the blocks of device models on this thread, which is the vCPU's. */
static void watch_devices(unsigned int index)
{
	if (!take_blocks || this_vcpu)
		return;
	this_vcpu = &vcpus[index];
	take_blocks(device_runs);
}

static void reset_done(void);

/* Start or stop watching if the bridge asked for it; on a vCPU's thread. */
static void follow_plan(void)
{
	static atomic_bool resetting;

	if (load(&plan->want) == load(&plan->have))
		atomic_store(&resetting, false);
	else if (!atomic_exchange(&resetting, true))
		qemu_plugin_reset(plugin_id, reset_done, NULL);
}

/* Tell the owner that all code is watched from now on. */
static void marker_runs(unsigned int index, void *data)
{
	struct vcpu *vcpu = &vcpus[index];

	(void)data;
	watch_devices(index);
	find_owner(vcpu, load(&plan->epoch));
	if (vcpu->owner != &nobody)
		atomic_store(vcpu->owner->hidden, PLAN_HIDDEN_SEEN);
}

static void vcpu_idles(unsigned int index)
{
	watch_devices(index);
	follow_plan();
}

static void vcpu_idles_with_id(qemu_plugin_id_t id, unsigned int index)
{
	(void)id;
	vcpu_idles(index);
}

static void block_translated(struct qemu_plugin_tb *tb)
{
	uint64_t start = qemu_plugin_tb_vaddr(tb);
	size_t n = qemu_plugin_tb_n_insns(tb);
	const struct plan_range *range;
	const struct qemu_plugin_insn *last;
	struct block block = { .start = start };
	uint64_t end;
	block_id found = 0;
	uint8_t code[15];
	size_t size;

	if (start < KERNEL_START || !n)
		return;
	size = insn_data(qemu_plugin_tb_get_insn(tb, 0), code, sizeof(code));
	if (size == sizeof(marker) && !memcmp(code, marker, sizeof(marker))) {
		pthread_mutex_lock(&translation);
		find_guest_memory(qemu_plugin_tb_get_insn(tb, 0), start);
		pthread_mutex_unlock(&translation);
		qemu_plugin_register_vcpu_tb_exec_cb(tb, marker_runs, QEMU_PLUGIN_CB_NO_REGS, NULL);
	}

	last = qemu_plugin_tb_get_insn(tb, n - 1);
	end = qemu_plugin_insn_vaddr(last) + qemu_plugin_insn_size(last);
	block.last = qemu_plugin_insn_vaddr(last) - start;
	block.bytes = end - start;
	size = insn_data(last, code, sizeof(code));
	block.flags = classify(code, size);
	if (n != 1)
		block.flags &= ~BLOCK_EXCLUSIVE;

	pthread_mutex_lock(&translation);
	read_ranges();
	range = range_of(start);
	if (range) {
		block.pc = start + range->delta;
		block.flags |= range->flags & PLAN_RECORD ? BLOCK_RECORD : 0;
		block.flags |= range->flags & PLAN_NOINSTR ? BLOCK_NOINSTR : 0;
		block.flags |= range->flags & PLAN_SCHEDULE_END ? BLOCK_SCHEDULE_END : 0;
		if (range->flags & PLAN_SCHEDULE && start == range->start)
			block.flags |= BLOCK_SCHEDULE;
		if (range->flags & PLAN_SWITCH_START && start == range->start)
			block.flags |= BLOCK_SWITCH_START;
		block.flags |= range->flags & PLAN_INTERRUPT_COUNT ? BLOCK_INTERRUPT_COUNT : 0;
		block.flags |= range->flags & PLAN_EXIT_WORK ? BLOCK_EXIT_WORK : 0;
		block.flags |= range->flags & PLAN_EXIT_DONE ? BLOCK_EXIT_DONE : 0;
		if (calls_schedule(end, code, size)) {
			block.flags |= BLOCK_CALLS_SCHEDULE;
			is_after_schedule(end, true);
		}
		if (is_after_schedule(start, false))
			block.flags |= BLOCK_AFTER_SCHEDULE;
		block.flags |= start == plan->syscall_entry ? BLOCK_SYSCALL : vector_flags(start);
		/*
		 * Other blocks need no callback: no recorded block continues one, because they
		 * belong to other functions. Nor do the further rounds of an instruction in a block
		 * that is only watched (memcpy(), memset()): its first round has told all.
		 */
		if (block.flags & (BLOCK_RECORD | BLOCK_SPECIAL | BLOCK_EXIT) ||
		    (block.flags & BLOCK_WATCHED && !(block.flags & BLOCK_REPEATS && !block.last))) {
			found = intern(&block);
			if (!found)
				plan->blocks_lost++;
		}
	}
	pthread_mutex_unlock(&translation);
	if (found)
		qemu_plugin_register_vcpu_tb_exec_cb(tb, callback_of(block.flags),
						     QEMU_PLUGIN_CB_NO_REGS, (void *)found);
}

static void block_translated_with_id(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	(void)id;
	block_translated(tb);
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
	qemu_plugin_register_vcpu_idle_cb(plugin_id, idle_cb, NULL);
	follow_plan();
}

/* ---- installation -------------------------------------------------------------------------- */

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
		return refuse("only qemu-system-x86_64 is supported");
	if (!plan || !region)
		return refuse("plan=FD,region=FD is missing; kcov-bridge passes it");
	if (plan_bytes < PLAN_BYTES || plan->magic != PLAN_MAGIC || plan->version != PLAN_VERSION)
		return refuse("another version of kcov-bridge wrote the plan");
	if (plan->hidden > region_bytes || plan->hidden % 8 || plan->hidden_stride % 8 ||
	    plan->hidden_stride > (region_bytes - plan->hidden) / PLAN_SLOTS ||
	    plan->ram_bytes < 4096)
		return refuse("the plan does not fit the region");
	ranges = calloc(PLAN_RANGES, sizeof(*ranges));
	insn_data_symbol = dlsym(RTLD_DEFAULT, "qemu_plugin_insn_data");
	if (!ranges || !insn_data_symbol)
		return refuse("out of memory, or the program is not QEMU");
	insn_data_copies = qemu_plugin_version >= 3;
	trans_cb = info->version.cur >= API_WITHOUT_ID ? (any_cb)block_translated :
							 (any_cb)block_translated_with_id;
	idle_cb = info->version.cur >= API_WITHOUT_ID ? (any_cb)vcpu_idles :
							(any_cb)vcpu_idles_with_id;
	take_blocks = dlsym(RTLD_DEFAULT, "kcov_bridge_take_blocks");
	cpus = (void *)((uint8_t *)plan + PLAN_CPUS_OFFSET);
	slots = (void *)((uint8_t *)plan + PLAN_SLOTS_OFFSET);
	blocks = (void *)((uint8_t *)plan + PLAN_BLOCKS_OFFSET);
	plugin_id = id;
	expedited = plan->barriers &&
		    !syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0);
	store(&plan->expedited, expedited);
	store(&plan->api, info->version.cur);
	qemu_plugin_register_vcpu_idle_cb(id, idle_cb, NULL);
	return 0;
}
