/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A handover: an interface's program moves between a tc filter and a tcx link while packets come, and each
 * packet meets it once. tcx runs before all filters. While the program is at both, udplb_mark stands at tcx
 * and udplb_skip among the filters; each runs the program by a tail call.
 */
#ifndef UDPLB_HANDOVER_H
#define UDPLB_HANDOVER_H

/* In skb->cb[CB_MAGIC] of packets that udplb_mark has seen; another number for each handover. */
const volatile __u32 handover_mark = 1;

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} handover SEC(".maps");

SEC("tc")
int udplb_mark(struct __sk_buff *skb)
{
	/* a recirculated clone needs its words, and does not leave the program */
	if (skb->cb[CB_MAGIC] != RECIRCULATE_MAGIC)
		skb->cb[CB_MAGIC] = handover_mark;
	bpf_tail_call(skb, &handover, 0);
	return TC_ACT_UNSPEC;
}

SEC("tc")
int udplb_skip(struct __sk_buff *skb)
{
	if (skb->cb[CB_MAGIC] == handover_mark)
		return TC_ACT_UNSPEC;
	bpf_tail_call(skb, &handover, 0);
	return TC_ACT_UNSPEC;
}

#endif
