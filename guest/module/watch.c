// SPDX-License-Identifier: GPL-2.0
/*
 * A host that records this kernel's own code, through a plugin in QEMU
 * (bridge/sources/guest_kernel/tcg/kcov_tcg.c): the description of this kernel for it, and the
 * start of an owner's recording.
 */

#include <linux/align.h>
#include <linux/io.h>
#include <linux/ktime.h>
#include <linux/reboot.h>
#include <linux/version.h>
#include <asm/desc.h>
#include <asm/msr.h>
#include <asm/processor.h>
#include <asm/smp.h>

#include "kcov_bridge.h"

/* Whether the host records this kernel's code. */
bool kb_kernel_watched;

/* PLAN_MARKER_BYTES: the plugin expects the marker within this many bytes of its address. */
#define KB_MARKER_BYTES	64

/*
 * A signal to the plugin: a NOP that no other code contains, at the start of its own basic block.
 * Within one page, so that its physical address is known.
 */
static noinline notrace __aligned(KB_MARKER_BYTES) void kb_marker(void)
{
	asm volatile("jmp 1f\n1: .byte 0x0f, 0x1f, 0x80, 'k', 'c', 'o', 'v'" : : : "memory");
}

static void kb_cpu_halt(void)
{
	/* The next interrupt ends the halt, at the latest a timer's tick. */
	asm volatile("hlt" : : : "memory");
}

/**
 * kb_owner_await_recording() - wait until the plugin records the new owner, kb_timeout_ms at most
 * @inst: the instance; recording is paused
 *
 * Without an owner the plugin watches no code, so it cannot see the marker. It learns of the new
 * owner when a vCPU halts.
 */
void kb_owner_await_recording(struct kb_instance *inst)
{
	ktime_t end = ktime_add_ms(ktime_get(), READ_ONCE(kb_timeout_ms));

	lockdep_assert_held(&inst->lock);
	for (;;) {
		kb_marker();
		if (READ_ONCE(*inst->hidden) == KB_HIDDEN_SEEN || ktime_after(ktime_get(), end))
			return;
		kb_cpu_halt();
	}
}

/* ---- the description of this kernel -------------------------------------------------------- */

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 2, 0) && LINUX_VERSION_CODE < KERNEL_VERSION(6, 15, 0)
#define kb_current_task(cpu)	per_cpu_ptr(&pcpu_hot.current_task, cpu)
#define kb_preempt_count(cpu)	per_cpu_ptr(&pcpu_hot.preempt_count, cpu)
#else
#define kb_current_task(cpu)	per_cpu_ptr(&current_task, cpu)
#define kb_preempt_count(cpu)	per_cpu_ptr(&__preempt_count, cpu)
#endif

static unsigned int kb_cpu_apic_id(unsigned int cpu)
{
#ifdef CONFIG_SMP
	return cpu_physical_id(cpu);
#else
	/* This is the only CPU. Intel manual, CPUID leaf 1: the initial APIC id. */
	return cpuid_ebx(1) >> 24;
#endif
}

static void kb_kernel_describe(struct kb_kernel *kernel)
{
	struct desc_ptr table;
	const gate_desc *gates;
	unsigned int cpu, vector;
	/* With CONFIG_CALL_PADDING the padding is aligned, and the function comes after it. */
	unsigned long marker = ALIGN_DOWN((unsigned long)kb_marker, KB_MARKER_BYTES);

	memset(kernel, 0, sizeof(*kernel));
	for_each_possible_cpu(cpu) {
		unsigned int id = kb_cpu_apic_id(cpu);

		if (id >= KB_KERNEL_CPUS)
			continue;
		kernel->cpu[id].current_task = slow_virt_to_phys((void *)kb_current_task(cpu));
		kernel->cpu[id].preempt_count = slow_virt_to_phys((void *)kb_preempt_count(cpu));
	}
	kernel->cpus = num_possible_cpus();
	kernel->syscall_entry = __rdmsr(MSR_LSTAR);
	kernel->marker = marker;
	kernel->marker_physical = slow_virt_to_phys((void *)marker);
	store_idt(&table);
	gates = (const gate_desc *)table.address;
	for (vector = 0; vector < ARRAY_SIZE(kernel->vectors); vector++)
		if ((vector + 1) * sizeof(*gates) <= table.size + 1)
			kernel->vectors[vector] = gate_offset(&gates[vector]);
}

/*
 * Report this kernel to the host, or its end if @here is false. Return whether the host records it.
 */
static bool kb_kernel_report(struct kb_bridge *bridge, bool here)
{
	struct kb_kernel *kernel = (struct kb_kernel *)bridge->payload;
	int err = -EIO;

	mutex_lock(&bridge->self.lock);
	/* Until it is settled, its last request may still need the payload. */
	if (kb_instance_settle(&bridge->self)) {
		mutex_lock(&bridge->payload_lock);
		WRITE_ONCE(bridge->payload_inst, &bridge->self);
		if (here)
			kb_kernel_describe(kernel);
		else
			memset(kernel, 0, sizeof(*kernel));
		err = kb_request(&bridge->self, KB_OP_KERNEL, 0, 0, 0, 0);
		mutex_unlock(&bridge->payload_lock);
	}
	mutex_unlock(&bridge->self.lock);
	/* At a halt the plugin discards all code that was translated before. */
	if (!err)
		kb_cpu_halt();
	return !err;
}

/* At reboot, power-off or kexec, because another kernel may run here before the host notices. */
static int kb_reboot_event(struct notifier_block *block, unsigned long event, void *data)
{
	kb_recording_pause_current();
	kb_kernel_report(kb_active, false);
	kb_recording_resume_current();
	return NOTIFY_DONE;
}

static struct notifier_block kb_reboot_notifier = {
	.notifier_call	= kb_reboot_event,
};

/* Report a module whose code was loaded and has not run yet, or has run for the last time. */
static int kb_module_event(struct notifier_block *block, unsigned long event, void *data)
{
	struct kb_bridge *bridge = kb_active;
	struct module *mod = data;
	u64 text, bytes;

	if (event != MODULE_STATE_COMING && event != MODULE_STATE_GOING)
		return NOTIFY_DONE;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	text = (unsigned long)mod->mem[MOD_TEXT].base;
	bytes = mod->mem[MOD_TEXT].size;
#else
	text = (unsigned long)mod->core_layout.base;
	bytes = mod->core_layout.text_size;
#endif
	kb_recording_pause_current();
	mutex_lock(&bridge->self.lock);
	if (kb_instance_settle(&bridge->self)) {
		mutex_lock(&bridge->payload_lock);
		WRITE_ONCE(bridge->payload_inst, &bridge->self);
		memset(bridge->payload, 0, MODULE_NAME_LEN);
		strscpy((char *)bridge->payload, mod->name, MODULE_NAME_LEN);
		kb_request(&bridge->self, KB_OP_MODULE, 0, event == MODULE_STATE_COMING, text,
			   bytes);
		mutex_unlock(&bridge->payload_lock);
	} else {
		kb_skipped_count(bridge);
	}
	mutex_unlock(&bridge->self.lock);
	kb_recording_resume_current();
	return NOTIFY_DONE;
}

static struct notifier_block kb_module_notifier = {
	.notifier_call	= kb_module_event,
};

static int kb_notifiers_register(void)
{
	int err;

	err = register_module_notifier(&kb_module_notifier);
	if (err)
		return err;
	err = register_reboot_notifier(&kb_reboot_notifier);
	if (err)
		unregister_module_notifier(&kb_module_notifier);
	return err;
}

static void kb_notifiers_unregister(void)
{
	unregister_reboot_notifier(&kb_reboot_notifier);
	unregister_module_notifier(&kb_module_notifier);
}

/* Describe this kernel to the host, and report later changes if the host records the kernel. */
static int kb_watch_update(struct kb_bridge *bridge)
{
	bool before = kb_kernel_watched;
	int err = 0;

	kb_kernel_watched = kb_kernel_report(bridge, true);
	if (kb_kernel_watched && !before) {
		err = kb_notifiers_register();
		kb_kernel_watched = !err;
	} else if (before && !kb_kernel_watched) {
		kb_notifiers_unregister();
	}
	return err;
}

/**
 * kb_watch_start() - describe this kernel to the host
 * @bridge: the device, which is active; its slots are free
 *
 * Return: 0 or a negative errno. It is no error if the host does not record the kernel, or does not
 * answer.
 */
int kb_watch_start(struct kb_bridge *bridge)
{
	int err;

	kb_instance_init(&bridge->self, bridge);
	err = kb_slot_acquire(&bridge->self);
	if (err)
		return err;
	return kb_watch_update(bridge);
}

/**
 * kb_watch_stop() - make the host forget this kernel
 * @bridge: the device, whose files are gone
 */
void kb_watch_stop(struct kb_bridge *bridge)
{
	if (kb_kernel_watched) {
		kb_notifiers_unregister();
		kb_kernel_report(bridge, false);
	}
	kb_kernel_watched = false;
	/* No further request in the module's name: see kb_untraced_report(). */
	mutex_lock(&bridge->self.lock);
	bridge->self.detached = true;
	mutex_unlock(&bridge->self.lock);
}

/*
 * The agent writes here when the guest continues from a snapshot, because the host is a new one
 * that does not know this kernel.
 */
static ssize_t kb_host_write(struct file *file, const char __user *data, size_t size, loff_t *at)
{
	static DEFINE_MUTEX(kb_describe_lock);
	int err;

	mutex_lock(&kb_describe_lock);
	/* Valid, because removal deletes this file before the device. */
	err = kb_watch_update(kb_active);
	mutex_unlock(&kb_describe_lock);
	return err ? err : (ssize_t)size;
}

const struct file_operations kb_host_fops = {
	.owner	= THIS_MODULE,
	.open	= simple_open,
	.write	= kb_host_write,
};
