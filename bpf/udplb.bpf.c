// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The packet's way: parse, match, select, rewrite and forward, count. */
#include <stdbool.h>
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_core_read.h>

#include "udplb.h"
#include "parse.h"
#include "rewrite.h"
#include "forward.h"

/* The segments of a GSO packet but the first, each of which has headers of its own. */
static __noinline void count_segments(struct __sk_buff *skb, struct counter *counter)
{
	__u32 headers, segments;
	__u8 version_ihl;

	if (bpf_skb_load_bytes(skb, sizeof(struct ethhdr), &version_ihl, sizeof(version_ihl)))
		return;
	headers = sizeof(struct ethhdr) + (version_ihl & 0xf) * 4 + sizeof(struct udphdr);
	/* a guest's packet comes without their number */
	segments = skb->gso_segs ?: (skb->len - headers + skb->gso_size - 1) / skb->gso_size;
	if (segments < 2)
		return;
	counter->packets += segments - 1;
	counter->bytes += (__u64)(segments - 1) * headers;
}

static __always_inline void count(struct __sk_buff *skb, __u32 id, enum verdict verdict)
{
	__u32 chunk = id / COUNTERS_PER_CHUNK, index = id % COUNTERS_PER_CHUNK;
	void *inner = bpf_map_lookup_elem(&counters, &chunk);
	struct counters *counters = inner ? bpf_map_lookup_elem(inner, &index) : NULL;
	struct counter *counter;

	if (!counters)
		return;
	counter = &counters->of[verdict];
	counter->packets++;
	counter->bytes += skb->len;
	if (skb->gso_size)
		count_segments(skb, counter);
}

/* Out of line: off the main path. */
static __noinline void count_aside(struct __sk_buff *skb, __u32 id, enum verdict verdict)
{
	count(skb, id, verdict);
}

static __always_inline const struct rule *match(const struct packet *packet)
{
	struct rule_key key = {
		.address = packet->ip->daddr,
		.port = packet->udp->dest,
	};

	return bpf_map_lookup_elem(&rules, &key);
}

/* The key of the strategy; the first two are those of udplb's first version, bit for bit. */
static __always_inline __u32 selection_key(const struct packet *packet, enum strategy strategy)
{
	__u16 port = packet->udp->source;
	__u64 hash;

	switch (strategy) {
	case STRATEGY_SRC_PORT:
		return __builtin_bswap16(bpf_ntohs(port)); /* as a little-endian number */
	case STRATEGY_SRC_IP:
		return bpf_ntohl(packet->ip->saddr);
	default:
		/* the finalizer of MurmurHash3 */
		hash = (__u64)bpf_ntohl(packet->ip->saddr) << 16 | bpf_ntohs(port);
		hash ^= hash >> 33;
		hash *= 0xff51afd7ed558ccdULL;
		hash ^= hash >> 33;
		hash *= 0xc4ceb9fe1a85ec53ULL;
		return hash ^ hash >> 33;
	}
}

static __always_inline const struct upstream *slot_upstream(__u32 slot)
{
	__u32 index = slot / SLOTS_PER_LINE;
	const struct slot_line *line = bpf_map_lookup_elem(&slots, &index);

	if (!line)
		return NULL;
	index = line->upstream[slot % SLOTS_PER_LINE];
	return bpf_map_lookup_elem(&upstreams, &index);
}

#define REHASHED_CHOICES 16
#define NEIGHBOUR_CHOICES 64

/*
 * The first of the key's other choices that is not down: spread by hashing, so that nobody
 * takes over a whole neighbour's flows, then slot by slot, so that a few are found among many.
 * NULL where all of them are down.
 */
static __noinline const struct upstream *other_choice(const struct rule *rule, __u32 key)
{
	const struct upstream *upstream;
	__u32 choice;

	for (choice = 0; choice < REHASHED_CHOICES + NEIGHBOUR_CHOICES; choice++) {
		if (choice < REHASHED_CHOICES)
			key = (key ^ key >> 15) * 0x9e3779b1 + choice;
		else
			key++;
		upstream = slot_upstream(rule->first_slot + key % rule->slots);
		if (upstream && !is_down(upstream))
			return upstream;
	}
	return NULL;
}

static __always_inline const struct upstream *select(const struct packet *packet, const struct rule *rule)
{
	const struct upstream *upstream;
	__u32 key;

	if (rule->slots <= 1)
		return slot_upstream(rule->first_slot);
	key = selection_key(packet, rule->strategy);
	upstream = slot_upstream(rule->first_slot + key % rule->slots);
	if (rule->skip_down && upstream && is_down(upstream))
		return other_choice(rule, key) ?: upstream;
	return upstream;
}

static __always_inline int handle(struct __sk_buff *skb, struct packet *packet, const struct rule *rule,
				  enum parsed parsed)
{
	int action = rule->action == ACTION_BLOCK ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	const struct upstream *upstream = NULL;
	struct way way = {};
	enum verdict verdict;
	__be32 source;

	if (parsed == PARSED_FIRST_FRAGMENT) {
		verdict = VERDICT_FRAGMENT;
	} else if (!well_formed(skb, packet)) {
		verdict = VERDICT_MALFORMED;
	} else if (!(upstream = select(packet, rule))) {
		verdict = VERDICT_NO_UPSTREAM;
	} else if (packet->ip->ttl <= 1) {
		verdict = VERDICT_TTL;
	} else {
		source = rule->source == SOURCE_VIP ? packet->ip->daddr : packet->ip->saddr;
		verdict = next_hop(skb, packet, upstream, source, &way);
		if (rule->action == ACTION_BLOCK)
			verdict = forward(skb, packet, upstream, source, &way, verdict, &action);
		else
			verdict = copy(skb, packet, upstream, source, &way, verdict, &action);
	}
	count(skb, upstream ? upstream->id : rule->id, verdict);
	return action;
}

SEC("tc")
int udplb(struct __sk_buff *skb)
{
	const struct rule *rule;
	struct packet packet;
	enum parsed parsed;

	parsed = parse(skb, &packet);
	if (parsed == PARSED_OTHER)
		return TC_ACT_UNSPEC;
	if (parsed == PARSED_LATER_FRAGMENT) {
		count_aside(skb, 0, VERDICT_FRAGMENT);
		return TC_ACT_UNSPEC;
	}
	rule = match(&packet);
	if (!rule)
		return TC_ACT_UNSPEC;
	if (skb->pkt_type != PACKET_HOST) {
		count_aside(skb, rule->id, VERDICT_NOT_FOR_US);
		return TC_ACT_UNSPEC;
	}
	return handle(skb, &packet, rule, parsed);
}

/* For interfaces whose packets begin with their IP header. */
SEC("tc")
int udplb_l3(struct __sk_buff *skb)
{
	(void)skb;
	return TC_ACT_UNSPEC;
}

/*
 * Run by arpd and never attached, since user space cannot read jiffies. How long the lease is
 * stands in skb->cb: in jiffies, and in milliseconds.
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

const char LICENSE[] SEC("license") = "Dual BSD/GPL";
