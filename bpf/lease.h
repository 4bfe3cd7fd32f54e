/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The lease of next hops: how long MAC addresses and health are trusted without arpd. */
#ifndef UDPLB_LEASE_H
#define UDPLB_LEASE_H

/* Returns the end of arpd's lease in jiffies; 0 if there never was one. */
static __always_inline __u64 lease_end(void)
{
	const __u32 only = 0;
	const struct heartbeat *last = bpf_map_lookup_elem(&heartbeat, &only);

	return last ? last->until : 0;
}

/* Returns true while arpd's lease holds, that is, while a daemon invalidates stale entries. */
static __always_inline bool lease_holds(void)
{
	return (__s64)(lease_end() - bpf_jiffies64()) > 0;
}

/*
 * Extends the lease by the time in skb->cb: word 0 in jiffies, word 1 in milliseconds. arpd runs it with
 * BPF_PROG_TEST_RUN because user space cannot read jiffies; it is never attached.
 */
SEC("tc")
int udplb_heartbeat(struct __sk_buff *skb)
{
	const __u32 only = 0;
	struct heartbeat *beat = bpf_map_lookup_elem(&heartbeat, &only);

	if (!beat)
		return TC_ACT_SHOT;
	beat->until = bpf_jiffies64() + skb->cb[0];
	beat->until_ktime = bpf_ktime_get_ns() + skb->cb[1] * 1000000ULL;
	return TC_ACT_OK;
}

#endif
