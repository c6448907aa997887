// SPDX-License-Identifier: GPL-2.0
/*
 * kcov_bridge: the kcov device on a kernel that was built without it.
 *
 * The host decides, and this module forwards. Each open of the device makes an instance with a slot
 * in the shared region (see kcov_bridge_abi.h). The life of an instance, in order:
 *
 *   open			takes a slot; the host learns of it with the first request
 *   ioctl(KCOV_INIT_TRACE)	forwarded; the host makes the area
 *   mmap			forwarded; the host returns the area's offset in the region
 *   ioctl(KCOV_ENABLE), ioctl(KCOV_UNIQUE_ENABLE), ioctl(KCOV_REMOTE_ENABLE)
 *				forwarded; on success the calling thread becomes the owner
 *   every system call of the owner
 *				at its end, just before user mode, if the host may have covered
 *				something since the last one: forwarded; the host appends PCs
 *   ioctl(KCOV_RESET_TRACE)	forwarded; the area is empty
 *   ioctl(KCOV_DISABLE), exit	forwarded; the instance has no owner
 *   close of the last descriptor	forwarded; the host decides whether the owner keeps tracing
 *   close, munmap, exit	when the last reference is dropped: forwarded; the slot is free again
 *
 * Commands of the host need no area in user space (KCOV_BRIDGE_STREAM): the host makes an area and
 * reads it itself, and the calling thread becomes the owner at once. With KCOV_BRIDGE_FOLLOW the
 * same happens for each of its children: see follow.c.
 *
 * A runner of test cases gets areas that the host has made (KCOV_BRIDGE_LANE, in place of
 * KCOV_INIT_TRACE), maps them, and enables all but the first as above.
 *
 * A program can connect to the host's target through the region, without a network: see wire.c.
 *
 * The module keeps only which task owns which instance. The device may be removed at any time
 * (remove in sysfs): the host then ends its instances, and operations on an open one fail with
 * ENODEV. A rescan finds a new device; old instances do not belong to it.
 *
 * This file is the PCI device; kcov_bridge.h says where the rest is.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/debugfs.h>
#include <linux/io.h>
#include <linux/miscdevice.h>
#include <linux/slab.h>
#include <linux/suspend.h>

#include "kcov_bridge.h"

#define KB_BAR_REGISTERS	0
#define KB_BAR_REGION		2

/* Refuse 0, with which each request would fail. */
static int kb_timeout_set(const char *text, const struct kernel_param *param)
{
	unsigned int ms;
	int err;

	err = kstrtouint(text, 0, &ms);
	if (err)
		return err;
	if (!ms) {
		pr_err("timeout_ms must be at least 1\n");
		return -EINVAL;
	}
	WRITE_ONCE(kb_timeout_ms, ms);
	return 0;
}

static const struct kernel_param_ops kb_timeout_ops = {
	.set	= kb_timeout_set,
	.get	= param_get_uint,
};

unsigned int kb_timeout_ms = 1000;
module_param_cb(timeout_ms, &kb_timeout_ops, &kb_timeout_ms, 0644);
MODULE_PARM_DESC(timeout_ms, "How long a request waits for the host (ms, at least 1)");

unsigned int kb_spin_us = 100;
module_param_named(spin_us, kb_spin_us, uint, 0644);
MODULE_PARM_DESC(spin_us, "How much of that it polls before it sleeps (us)");

struct kb_bridge *kb_active;

static struct miscdevice kb_misc = {
	.minor	= MISC_DYNAMIC_MINOR,
	.name	= "kcov",
	.mode	= 0600,
	.fops	= &kb_device_fops,
};

static void kb_bridge_free(struct kref *ref)
{
	struct kb_bridge *bridge = container_of(ref, struct kb_bridge, ref);

	mutex_destroy(&bridge->self.lock);
	mutex_destroy(&bridge->payload_lock);
	kfree_rcu(bridge, rcu);
}

/**
 * kb_bridge_put() - drop a reference to the device
 * @bridge: the device
 */
void kb_bridge_put(struct kb_bridge *bridge)
{
	kref_put(&bridge->ref, kb_bridge_free);
}

/* Return the file's name in debugfs, which differs from that of the kernel's own kcov. */
static const char *kb_file_name(void)
{
	struct dentry *own = debugfs_lookup("kcov", NULL);

	if (!own)
		return "kcov";
	dput(own);
	return "kcov_bridge";
}

static int kb_header_check(struct pci_dev *pdev, const struct kb_header *header, u64 bytes)
{
	if (header->magic != KB_MAGIC) {
		dev_info(&pdev->dev, "not a region of kcov-bridge\n");
		return -ENODEV;
	}
	if (header->version != KB_VERSION || header->slots != KB_SLOTS ||
	    header->requests_offset != KB_REQUESTS_OFFSET ||
	    header->responses_offset != KB_RESPONSES_OFFSET ||
	    header->areas_offset != KB_AREAS_OFFSET || header->region_bytes != bytes) {
		dev_err(&pdev->dev,
			"the region has version %llu, this module has %d: rebuild the image\n",
			header->version, KB_VERSION);
		return -EPROTO;
	}
	return 0;
}

/* Map registers and region; the driver core unmaps both with the device. */
static int kb_bridge_map(struct kb_bridge *bridge, struct pci_dev *pdev)
{
	void *control;
	int err;

	err = pcim_enable_device(pdev);
	if (err)
		return err;
	err = pcim_iomap_regions(pdev, BIT(KB_BAR_REGISTERS), KBUILD_MODNAME);
	if (err)
		return err;
	bridge->registers = pcim_iomap_table(pdev)[KB_BAR_REGISTERS];
	bridge->region_start = pci_resource_start(pdev, KB_BAR_REGION);
	bridge->region_bytes = pci_resource_len(pdev, KB_BAR_REGION);
	if (bridge->region_bytes < KB_AREAS_OFFSET + PAGE_SIZE)
		return -ENODEV;
	if (!devm_request_mem_region(&pdev->dev, bridge->region_start, bridge->region_bytes,
				     KBUILD_MODNAME))
		return -EBUSY;
	control = devm_memremap(&pdev->dev, bridge->region_start, KB_AREAS_OFFSET, MEMREMAP_WB);
	if (IS_ERR(control))
		return PTR_ERR(control);
	bridge->header = control;
	bridge->requests = control + KB_REQUESTS_OFFSET;
	bridge->responses = control + KB_RESPONSES_OFFSET;
	bridge->payload = control + KB_PAYLOAD_OFFSET;
	err = kb_header_check(pdev, bridge->header, bridge->region_bytes);
	if (err)
		return err;
	bridge->host_peer = bridge->header->host_peer;
	return 0;
}

static void kb_files_create(struct kb_bridge *bridge, struct pci_dev *pdev)
{
	bridge->device_file = debugfs_create_file_unsafe(kb_file_name(), 0600, NULL, NULL,
							 &kb_device_fops);
	if (IS_ERR(bridge->device_file)) {
		dev_info(&pdev->dev, "no debugfs: the device is only /dev/%s\n", kb_misc.name);
		bridge->device_file = NULL;
	}
	bridge->stats_file = debugfs_create_file("kcov_bridge_stats", 0400, NULL, NULL,
						 &kb_stats_fops);
	bridge->host_file = debugfs_create_file("kcov_bridge_host", 0200, NULL, NULL,
						&kb_host_fops);
}

static int kb_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct kb_bridge *bridge;
	int err;

	if (kb_active)
		return -EBUSY;
	bridge = kzalloc(sizeof(*bridge), GFP_KERNEL);
	if (!bridge)
		return -ENOMEM;
	kref_init(&bridge->ref);
	mutex_init(&bridge->payload_lock);
	spin_lock_init(&bridge->slots_lock);
	init_waitqueue_head(&bridge->slot_released);
	spin_lock_init(&bridge->lost_lock);
	err = kb_bridge_map(bridge, pdev);
	if (err)
		goto put;

	kb_active = bridge;
	/* Disown the instances that an earlier life of the device could not end. */
	kb_slots_name_generations(bridge);
	err = kb_watch_start(bridge);
	if (err)
		goto inactive;
	err = misc_register(&kb_misc);
	if (err)
		goto unwatched;
	err = kb_wires_start(bridge, pdev);
	if (err)
		goto unregister;
	kb_files_create(bridge, pdev);
	pci_set_drvdata(pdev, bridge);
	dev_info(&pdev->dev, "kcov from the host, %llu MiB shared\n", bridge->region_bytes >> 20);
	return 0;

unregister:
	misc_deregister(&kb_misc);
	kb_instances_detach(bridge);
	kb_hooks_remove();
unwatched:
	kb_watch_stop(bridge);
inactive:
	kb_active = NULL;
put:
	kb_bridge_put(bridge);
	return err;
}

static void kb_remove(struct pci_dev *pdev)
{
	struct kb_bridge *bridge = pci_get_drvdata(pdev);
	unsigned int detached;

	/* From here on the device cannot be opened. */
	debugfs_remove(bridge->host_file);
	debugfs_remove(bridge->stats_file);
	debugfs_remove(bridge->device_file);
	misc_deregister(&kb_misc);
	kb_wires_stop();
	detached = kb_instances_detach(bridge);
	if (detached)
		pci_warn(pdev, "removed: the %u open instances trace nothing more\n", detached);
	kb_hooks_remove();
	kb_calls_stop(bridge);
	kb_watch_stop(bridge);
	kb_active = NULL;
	kb_bridge_put(bridge);
}

static const struct pci_device_id kb_ids[] = {
	{ PCI_DEVICE(KB_PCI_VENDOR_ID, KB_PCI_DEVICE_ID) },
	{ }
};
MODULE_DEVICE_TABLE(pci, kb_ids);

static struct pci_driver kb_driver = {
	.name		= KBUILD_MODNAME,
	.id_table	= kb_ids,
	.probe		= kb_probe,
	.remove		= kb_remove,
};

/*
 * Refuse to suspend or hibernate. Nothing would wake this guest, which has no keys and no lid, and
 * the host cannot tell a guest that is suspended to idle from one that is idle.
 */
static int kb_sleep_event(struct notifier_block *block, unsigned long event, void *data)
{
	switch (event) {
	case PM_SUSPEND_PREPARE:
	case PM_HIBERNATION_PREPARE:
	case PM_RESTORE_PREPARE:
		pr_info_ratelimited("refusing to sleep: nothing would wake this guest\n");
		return notifier_from_errno(-EBUSY);
	default:
		return NOTIFY_DONE;
	}
}

static struct notifier_block kb_sleep_notifier = {
	.notifier_call	= kb_sleep_event,
};

static int __init kb_init(void)
{
	int err;

	BUILD_BUG_ON(sizeof(struct kb_header) > KB_REQUESTS_OFFSET);
	BUILD_BUG_ON(sizeof(struct kb_request) != 64);
	BUILD_BUG_ON(sizeof(struct kb_response) != 64);
	BUILD_BUG_ON(sizeof(struct kb_kernel) > KB_AREAS_OFFSET - KB_PAYLOAD_OFFSET);

	err = kb_hooks_find();
	if (err)
		return err;
	kb_numbers_seed();
	err = register_pm_notifier(&kb_sleep_notifier);
	if (err)
		return err;
	/* Last, because there may be users from probe on, and a failing init frees the module. */
	err = pci_register_driver(&kb_driver);
	if (err)
		goto unregister;
	if (!kb_active) {
		pr_err("no ivshmem device with a region of kcov-bridge in this machine\n");
		pci_unregister_driver(&kb_driver);
		err = -ENODEV;
		goto unregister;
	}
	return 0;

unregister:
	unregister_pm_notifier(&kb_sleep_notifier);
	return err;
}
module_init(kb_init);

static void __exit kb_exit(void)
{
	pci_unregister_driver(&kb_driver);
	unregister_pm_notifier(&kb_sleep_notifier);
	/* Wait until the task that dropped the module's last reference has left its code. */
	synchronize_rcu_tasks();
}
module_exit(kb_exit);

MODULE_AUTHOR("kcov-bridge developers");
MODULE_DESCRIPTION("The kcov device, filled by the host");
MODULE_LICENSE("GPL");
