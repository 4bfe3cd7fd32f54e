/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Counts packets and bytes by verdict. */
#ifndef UDPLB_COUNT_H
#define UDPLB_COUNT_H

/*
 * Returns the size of a packet as it is counted: each segment of a GSO packet is a packet, and has the
 * headers again. `bytes` is its length without VLAN tags.
 */
static __always_inline struct counter counted_size(struct __sk_buff *skb, __u32 packed, __u32 bytes)
{
	struct counter size = {.packets = 1, .bytes = bytes};
	__u32 headers, segments;

	if (!skb->gso_size || packed == PKT_UNKNOWN)
		return size;
	headers = segment_headers(skb, packed);
	segments = skb->gso_segs;
	/* a virtual machine's packet comes without gso_segs */
	if (!segments && bytes > headers)
		segments = (bytes - headers + skb->gso_size - 1) / skb->gso_size;
	if (segments < 2)
		return size;
	size.packets = segments;
	size.bytes += (__u64)(segments - 1) * headers;
	return size;
}

/*
 * Stores the current time and a verdict. All CPUs share it, so it is written only where it differs: the time
 * once in a jiffy.
 */
static __always_inline void update_moment(struct moment *moment, enum verdict verdict)
{
	__u32 tick = bpf_jiffies64();

	if (moment->verdict != verdict)
		moment->verdict = verdict;
	if (moment->tick == tick)
		return;
	moment->tick = tick;
	moment->time = bpf_ktime_get_ns();
}

/* Returns true for a packet that should have been sent; `fragments` of a rule may exclude fragments. */
static __always_inline bool is_lost(enum verdict verdict)
{
	return verdict < VERDICTS && verdict != VERDICT_NOT_FOR_US && verdict != VERDICT_FRAGMENT;
}

/* Returns the counters of an id; NULL if it has none. */
static __always_inline struct counters *get_counters(__u32 id)
{
	__u32 chunk = id / COUNTERS_PER_CHUNK, index = id % COUNTERS_PER_CHUNK;
	void *inner = bpf_map_lookup_elem(&counters, &chunk);

	return inner ? bpf_map_lookup_elem(inner, &index) : NULL;
}

/*
 * Counts a packet under an id, unless it was forwarded to an upstream: see count_forwarded(). `tags` is the
 * length in bytes of the VLAN tags in the frame, which are not counted. A global function so that its
 * outcomes do not multiply the paths that the verifier explores.
 */
__noinline __u32 count_verdict(struct __sk_buff *skb, __u32 packed, __u32 tags, __u32 id, __u32 verdict)
{
	struct counters *counters = get_counters(id);
	struct counter *counter, size;
	__u64 place = verdict;

	/* keeps clang from comparing a copy, after which 5.10 does not know the bound */
	asm volatile("" : "+r"(place));
	if (!counters || features.dry_run || place >= COUNTERS)
		return 0;
	counter = &counters->of[place];
	size = counted_size(skb, packed, skb->len - tags);
	__sync_fetch_and_add(&counter->packets, size.packets);
	__sync_fetch_and_add(&counter->bytes, size.bytes);
	if (is_sent(verdict))
		update_moment(&counters->forwarded, verdict);
	else if (is_lost(verdict))
		update_moment(&counters->lost, verdict);
	return 0;
}

/* Returns the line that this CPU has of the upstream at an index; NULL if there is none. */
static __always_inline struct line *get_line(__u32 index)
{
	const __u32 of_cpu = features.lines;
	__u32 at = bpf_get_smp_processor_id() * of_cpu + index;

	return index < of_cpu ? bpf_map_lookup_elem(&lines, &at) : NULL;
}

/* Counts packets that this CPU has forwarded to the upstream of a line. */
static __always_inline void count_sent(struct line *line, __u64 packets, __u64 bytes)
{
	line->packets += packets;
	line->bytes += bytes;
}

/*
 * Counts a packet with VERDICT_FORWARDED to an upstream, behind an Ethernet header without VLAN tags. A
 * global function for the same reason.
 */
__noinline __u32 count_forwarded(struct __sk_buff *skb, __u32 packed, __u32 index, __u32 id)
{
	struct counter size = counted_size(skb, packed, skb->len);
	struct counters *counters = get_counters(id);
	struct line *line = get_line(index);

	if (!line || !counters || features.dry_run)
		return 0;
	count_sent(line, size.packets, size.bytes);
	update_moment(&counters->forwarded, VERDICT_FORWARDED);
	return 0;
}

/* Counts a packet behind an Ethernet header without VLAN tags. */
static __always_inline void count_pkt(struct __sk_buff *skb, const struct pkt *pkt, __u32 id,
				      enum verdict verdict)
{
	count_verdict(skb, pkt->packed, 0, id, verdict);
}

/*
 * Counts a packet to an upstream; a clone of templates that was sent has a note and no verdict, since its
 * packet is counted where it was selected to go.
 */
static __always_inline void count_xmit(struct __sk_buff *skb, const struct pkt *pkt,
				       const struct upstream *upstream, enum verdict verdict)
{
	if (EXTRA(templates) && pkt_has(pkt, PKT_F_BESIDES) && is_sent(verdict))
		count_pkt(skb, pkt, upstream->id, NOTE_TEMPLATES);
	else if (verdict == VERDICT_FORWARDED)
		count_forwarded(skb, pkt->packed, upstream->line, upstream->id);
	else
		count_pkt(skb, pkt, upstream->id, verdict);
}

#endif
