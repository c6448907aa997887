// SPDX-License-Identifier: GPL-2.0
/* Figures for people: kcov_bridge_stats in debugfs. */

#include <linux/seq_file.h>

#include "kcov_bridge.h"

static int kb_stats_show(struct seq_file *file, void *unused)
{
	/* Valid, because removal deletes this file before the device. */
	struct kb_bridge *bridge = kb_active;
	unsigned int slot;

	seq_printf(file, "host %s, timeouts %lld, skipped %lld, unreleased %d\n",
		   kb_host_is_gone(bridge) ? "gone" : "here", atomic64_read(&bridge->timeouts),
		   atomic64_read(&bridge->skipped), bitmap_weight(bridge->zombies, KB_SLOTS));
	seq_puts(file, "slot owner appended dropped timeouts skipped\n");
	spin_lock(&bridge->slots_lock);
	rcu_read_lock();
	for_each_set_bit(slot, bridge->slots, KB_SLOTS) {
		const struct kb_response *response = &bridge->responses[slot];
		struct kb_instance *inst = bridge->instances[slot];
		struct kb_owner *owner;

		if (!inst)
			continue;
		owner = READ_ONCE(inst->owner);
		/* A slot's response may still belong to the previous instance. */
		seq_printf(file, "%u %u %llu %llu %lld %lld\n", slot, owner ? (u32)owner->id : 0,
			   READ_ONCE(inst->answered) ? READ_ONCE(response->appended) : 0,
			   READ_ONCE(inst->answered) ? READ_ONCE(response->dropped) : 0,
			   atomic64_read(&inst->timeouts), atomic64_read(&inst->skipped));
	}
	rcu_read_unlock();
	spin_unlock(&bridge->slots_lock);
	return 0;
}

static int kb_stats_open(struct inode *inode, struct file *file)
{
	return single_open(file, kb_stats_show, NULL);
}

const struct file_operations kb_stats_fops = {
	.owner		= THIS_MODULE,
	.open		= kb_stats_open,
	.read		= seq_read,
	.llseek		= seq_lseek,
	.release	= single_release,
};
