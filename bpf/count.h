/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Packets and bytes by verdict. */
#ifndef UDPLB_COUNT_H
#define UDPLB_COUNT_H

/* The segments of a GSO packet but the first, each of which has headers of its own. */
static __always_inline void count_segments(struct __sk_buff *skb, __u32 layout, __u32 bytes,
					   struct counter *counter)
{
	__u32 headers = segment_headers(skb, layout), segments = skb->gso_segs;

	/* a guest's packet comes without their number */
	if (!segments && bytes > headers)
		segments = (bytes - headers + skb->gso_size - 1) / skb->gso_size;
	if (segments < 2)
		return;
	counter->packets += segments - 1;
	counter->bytes += (__u64)(segments - 1) * headers;
}

static __always_inline void update_moment(struct moment *moment, enum verdict verdict)
{
	__u32 tick = bpf_jiffies64();

	moment->verdict = verdict;
	if (moment->tick == tick)
		return;
	moment->tick = tick;
	moment->time = bpf_ktime_get_ns();
}

static __always_inline bool is_given_away(enum verdict verdict)
{
	return verdict <= VERDICT_STALE_NEIGHBOUR || verdict == VERDICT_UNRESOLVED;
}

/* Returns true for packets that were to be sent. `fragments` of the rule may leave one out. */
static __always_inline bool is_lost(enum verdict verdict)
{
	return verdict < VERDICTS && verdict != VERDICT_NOT_FOR_US && verdict != VERDICT_FRAGMENT;
}

/* `tags`: what is in the frame that the layout does not know of, in bytes. */
static __always_inline void count(struct __sk_buff *skb, __u32 layout, __u32 tags, __u32 id,
				  enum verdict which)
{
	__u32 chunk = id / COUNTERS_PER_CHUNK, index = id % COUNTERS_PER_CHUNK, bytes = skb->len - tags;
	void *inner = bpf_map_lookup_elem(&counters, &chunk);
	struct counters *counters = inner ? bpf_map_lookup_elem(inner, &index) : NULL;
	struct counter *counter;
	__u64 place = which;

	/* or 5.10 loses the bound, as the compiler compares a copy */
	asm volatile("" : "+r"(place));
	if (!counters || features.dry_run || place >= COUNTERS)
		return;
	counter = &counters->of[place];
	counter->packets++;
	counter->bytes += bytes;
	if (is_given_away(which))
		update_moment(&counters->forwarded, which);
	else if (is_lost(which))
		update_moment(&counters->lost, which);
	if (skb->gso_size && layout)
		count_segments(skb, layout, bytes, counter);
}

/* Out of line: off the main path, and the verifier need not go on from each of its ends. */
__noinline __u32 count_verdict(struct __sk_buff *skb, __u32 layout, __u32 tags, __u32 id, __u32 which)
{
	count(skb, layout, tags, id, which);
	return 0;
}

#endif
