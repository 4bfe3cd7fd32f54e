/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Tells user space what becomes of a packet, if somebody asked for it. */
#ifndef UDPLB_TRACE_H
#define UDPLB_TRACE_H

static __always_inline struct trace *get_trace(void)
{
	const __u32 only = 0;

	return bpf_map_lookup_elem(&tracing, &only);
}

static __always_inline struct event *get_draft(void)
{
	const __u32 only = 0;

	return bpf_map_lookup_elem(&drafts, &only);
}

static __always_inline bool is_within(const __be32 *address, const __be32 *network, __u32 bits)
{
	int word;

#pragma unroll
	for (word = 0; word < 4; word++) {
		__u32 here = bits > 32 ? 32 : bits, mask = here ? ~0U << (32 - here) : 0;

		if ((address[word] ^ network[word]) & bpf_htonl(mask))
			return false;
		bits -= here;
	}
	return true;
}

static __always_inline void take_snapshot(struct __sk_buff *skb, struct snapshot *snapshot)
{
	const __u32 chunk = 2;
	__u32 i;

	snapshot->length = skb->len;
	for (i = 0; i < SNAPSHOT; i += chunk) {
		if (bpf_skb_load_bytes(skb, i, snapshot->bytes + i, chunk))
			break;
	}
	snapshot->there = i;
}

/* The frame as it leaves. */
__noinline __u32 trace_frame(struct __sk_buff *skb)
{
	const struct trace *trace = get_trace();
	struct event *event = get_draft();

	if (trace && event && trace->frames)
		take_snapshot(skb, &event->left);
	return 0;
}

static __always_inline bool draft(struct __sk_buff *skb, __u32 rule, __u32 layout, struct event *event)
{
	struct packet packet;

	if (!locate(skb, layout, &packet))
		return false;
	__builtin_memset(event, 0, offsetof(struct event, came.bytes));
	event->left.there = 0;
	event->time = bpf_ktime_get_ns();
	event->interface = skb->ifindex;
	event->generation = features.generation;
	event->rule = rule;
	event->length = skb->len;
	event->ipv6 = packet.is_ipv6;
	event->fragment = !packet.has_udp;
	if (packet.is_ipv6) {
		__builtin_memcpy(event->source, &packet.ip6->saddr, sizeof(event->source));
		__builtin_memcpy(event->destination, &packet.ip6->daddr, sizeof(event->destination));
	} else {
		event->source[0] = packet.ip->saddr;
		event->destination[0] = packet.ip->daddr;
	}
	if (packet.has_udp) {
		event->source_port = packet.udp->source;
		event->port = packet.udp->dest;
	}
	return true;
}

/* Begins the event of a packet; LAYOUT_TRACED if it is one of those that are asked for. */
__noinline __u32 begin_trace(struct __sk_buff *skb, __u32 rule, __u32 layout)
{
	struct sending *sending = get_sending();
	struct trace *trace = get_trace();
	struct event *event = get_draft();

	if (!trace || !event || !sending || (trace->rule && trace->rule != rule) ||
	    !draft(skb, rule, layout, event))
		return 0;
	if (event->time > trace->until) {
		/* whoever asked is gone */
		trace->until = 0;
		return 0;
	}
	if (!is_within(event->source, trace->source, trace->source_bits) ||
	    !is_within(event->destination, trace->destination, trace->destination_bits))
		return 0;
	if (trace->sample > 1 && ++trace->passed < trace->sample)
		return 0;
	trace->passed = 0;
	/* of an earlier packet; end_trace() clears it for the next copy */
	__builtin_memset(&sending->way, 0, sizeof(sending->way));
	if (trace->frames)
		take_snapshot(skb, &event->came);
	return LAYOUT_TRACED;
}

/* LAYOUT_TRACED, or 0, which is all that costs anything where nobody asks. */
static __always_inline __u32 trace(struct __sk_buff *skb, __u32 rule, __u32 layout)
{
	const struct trace *trace = get_trace();

	return trace && trace->until ? begin_trace(skb, rule, layout) : 0;
}

/* What selected the upstream. */
static __always_inline void trace_choice(__u32 layout, __u32 key, __u32 slots)
{
	struct event *event = layout & LAYOUT_TRACED ? get_draft() : NULL;

	if (!event)
		return;
	event->key = key;
	event->slot = slots > 1 ? key % slots : 0;
}

/* Tells how it ended; `upstream` is 0 where there was none. Nobody is woken up: who listens looks by itself.
 */
__noinline __u32 end_trace(__u32 upstream, __u32 verdict)
{
	struct sending *sending = get_sending();
	struct trace *trace = get_trace();
	struct event *event = get_draft();
	long lost;

	if (!trace || !event || !sending || (trace->drops && verdict <= VERDICT_STALE_NEIGHBOUR))
		return 0;
	event->upstream = upstream;
	event->verdict = verdict;
	event->out = upstream ? sending->way.ifindex : 0;
	if (upstream) {
		__builtin_memcpy(event->gateway, sending->way.gateway, sizeof(event->gateway));
		copy_macs(event->macs, sending->way.frame);
		__builtin_memset(&sending->way, 0, sizeof(sending->way));
	}
	if (trace->frames)
		lost = bpf_ringbuf_output(&events, event, sizeof(*event), BPF_RB_NO_WAKEUP);
	else
		lost = bpf_ringbuf_output(&events, event, offsetof(struct event, came), BPF_RB_NO_WAKEUP);
	if (lost)
		__sync_fetch_and_add(&trace->lost, 1);
	return 0;
}

#endif
