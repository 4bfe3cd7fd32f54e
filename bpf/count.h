/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Counts packets and bytes by verdict. */
#ifndef UDPLB_COUNT_H
#define UDPLB_COUNT_H

/* Adds the further segments of a GSO packet; each one has the headers again. */
static __always_inline void count_segments(struct __sk_buff *skb, __u32 packed, __u32 bytes,
					   struct counter *counter)
{
	__u32 headers = segment_headers(skb, packed), segments = skb->gso_segs;

	/* a virtual machine's packet comes without gso_segs */
	if (!segments && bytes > headers)
		segments = (bytes - headers + skb->gso_size - 1) / skb->gso_size;
	if (segments < 2)
		return;
	counter->packets += segments - 1;
	counter->bytes += (__u64)(segments - 1) * headers;
}

/* Stores the current time and a verdict; reads the clock once per jiffy. */
static __always_inline void update_moment(struct moment *moment, enum verdict verdict)
{
	__u32 tick = bpf_jiffies64();

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

/*
 * Counts a packet under an id. `tags` is the length in bytes of the VLAN tags in the frame, which are not
 * counted. A global function so that its outcomes do not multiply the paths that the verifier explores.
 */
__noinline __u32 count_verdict(struct __sk_buff *skb, __u32 packed, __u32 tags, __u32 id, __u32 verdict)
{
	__u32 chunk = id / COUNTERS_PER_CHUNK, index = id % COUNTERS_PER_CHUNK, bytes = skb->len - tags;
	void *inner = bpf_map_lookup_elem(&counters, &chunk);
	struct counters *counters = inner ? bpf_map_lookup_elem(inner, &index) : NULL;
	struct counter *counter;
	__u64 place = verdict;

	/* keeps clang from comparing a copy, after which 5.10 does not know the bound */
	asm volatile("" : "+r"(place));
	if (!counters || features.dry_run || place >= COUNTERS)
		return 0;
	counter = &counters->of[place];
	counter->packets++;
	counter->bytes += bytes;
	if (is_sent(verdict))
		update_moment(&counters->forwarded, verdict);
	else if (is_lost(verdict))
		update_moment(&counters->lost, verdict);
	if (skb->gso_size && packed != PKT_UNKNOWN)
		count_segments(skb, packed, bytes, counter);
	return 0;
}

/* Counts a packet behind an Ethernet header without VLAN tags. */
static __always_inline void count_pkt(struct __sk_buff *skb, const struct pkt *pkt, __u32 id,
				      enum verdict verdict)
{
	count_verdict(skb, pkt->packed, 0, id, verdict);
}

#endif
