/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which upstream, which receivers. src/flow.rs has the same arithmetic for user space. */
#ifndef UDPLB_SELECT_H
#define UDPLB_SELECT_H

/* The finalizer of MurmurHash3. */
static __always_inline __u64 mix(__u64 hash)
{
	hash ^= hash >> 33;
	hash *= 0xff51afd7ed558ccdULL;
	hash ^= hash >> 33;
	hash *= 0xc4ceb9fe1a85ec53ULL;
	return hash ^ hash >> 33;
}

/* FNV-1a. */
#define FNV_BASIS 0xcbf29ce484222325ULL
#define FNV_PRIME 0x100000001b3ULL

#define PAYLOAD_MOST 64	  /* bytes that are hashed */
#define METRIC_MOST 256	  /* of the name of a metric */
#define METRICS_MOST 1500 /* bytes that are searched for another metric */

/* Of what payload_key() and metric_key() return. */
#define KEY_FOUND (1ULL << 32)
#define KEY_SEVERAL (1ULL << 33)

/* Where the payload begins; `length` is the whole datagram's, of which this may be the first fragment. */
static __always_inline __u8 *payload_of(struct __sk_buff *skb, __u32 layout, __u32 readable, __u32 *length)
{
	struct udphdr *udp;

	if (!pull(skb, (layout & LAYOUT_UDP) + sizeof(*udp) + readable))
		return NULL;
	udp = (void *)(long)skb->data + (layout & LAYOUT_UDP);
	if ((void *)(udp + 1) > data_end(skb) || bpf_ntohs(udp->len) < sizeof(*udp))
		return NULL;
	*length = bpf_ntohs(udp->len) - sizeof(*udp);
	return (void *)(udp + 1);
}

/* The hash of `length` bytes at `offset` of the payload, with KEY_FOUND; 0 where it ends before them. */
__noinline __u64 payload_key(struct __sk_buff *skb, __u32 layout, __u32 offset, __u32 length)
{
	__u64 hash = FNV_BASIS;
	__u32 there = 0, i;
	__u8 *byte = payload_of(skb, layout, offset + length, &there);

	if (!byte || offset + length > there)
		return 0;
	byte += offset & 0x3fff;
	for (i = 0; i < PAYLOAD_MOST && i < length; i++, byte++) {
		if ((void *)(byte + 1) > data_end(skb))
			return 0;
		hash = (hash ^ *byte) * FNV_PRIME;
	}
	return (__u32)mix(hash) | KEY_FOUND;
}

/* Whether one of the `length` bytes at `offset` of the payload ends a line. */
__noinline __u32 has_newline(struct __sk_buff *skb, __u32 layout, __u32 offset, __u32 length)
{
	const __u64 ones = ~0ULL / 255;
	__u32 there = 0, i;
	__u8 *byte = payload_of(skb, layout, METRICS_MOST, &there);
	__u64 word;

	if (!byte)
		return false;
	byte += offset & 0x3fff;
	for (i = 0; i < METRICS_MOST / sizeof(word) && length >= sizeof(word); i++) {
		if ((void *)(byte + sizeof(word)) > data_end(skb))
			return false;
		word = *(const __u64 *)byte ^ ones * '\n';
		if ((word - ones) & ~word & ones << 7)
			return true;
		byte += sizeof(word);
		length -= sizeof(word);
	}
	for (i = 0; i < sizeof(word) && i < length; i++, byte++) {
		if ((void *)(byte + 1) > data_end(skb))
			return false;
		if (*byte == '\n')
			return true;
	}
	return false;
}

/*
 * The hash of the metric's name, which ends at a colon, with KEY_FOUND; 0 where there is none. With
 * KEY_SEVERAL where other metrics follow.
 */
__noinline __u64 metric_key(struct __sk_buff *skb, __u32 layout)
{
	__u64 hash = FNV_BASIS, several;
	__u32 there = 0, i;
	__u8 *byte = payload_of(skb, layout, METRICS_MOST, &there);

	if (!byte)
		return 0;
	for (i = 0; i <= METRIC_MOST; i++, byte++) {
		if (i >= there || (void *)(byte + 1) > data_end(skb) || *byte == '\n')
			return 0;
		if (*byte == ':')
			break;
		hash = (hash ^ *byte) * FNV_PRIME;
	}
	if (i == 0 || i > METRIC_MOST)
		return 0;
	/* the last byte may end the line of the only one */
	several = has_newline(skb, layout, i, there - i - 1) ? KEY_SEVERAL : 0;
	return (__u32)mix(hash) | KEY_FOUND | several;
}

static __always_inline __u64 fold_address(const struct packet *packet)
{
	const __be32 *words;

	if (!packet->is_ipv6)
		return bpf_ntohl(packet->ip->saddr);
	words = packet->ip6->saddr.in6_u.u6_addr32;
	return mix(mix((__u64)bpf_ntohl(words[0]) << 32 | bpf_ntohl(words[1])) ^
		   ((__u64)bpf_ntohl(words[2]) << 32 | bpf_ntohl(words[3])));
}

/* What of the packet selects, by the sender; those that are numbers are udplb's first version's, bit for bit.
 */
static __always_inline __u32 sender_key(const struct packet *packet, enum strategy strategy, bool hashed)
{
	__u16 port = packet->udp->source;
	__u64 key;

	if (strategy == STRATEGY_SRC_PORT) {
		key = __builtin_bswap16(bpf_ntohs(port)); /* as a little-endian number */
	} else {
		key = fold_address(packet);
		if (strategy == STRATEGY_SRC_IP)
			return hashed ? mix(key) : key;
		key = key << 16 ^ bpf_ntohs(port);
		hashed = true;
	}
	return hashed ? mix(key) : key;
}

static __always_inline const struct upstream *slot_upstream(__u32 slot, __u32 first_upstream, __u32 *index)
{
	__u32 line_index = slot / SLOTS_PER_LINE;
	const struct slot_line *line = bpf_map_lookup_elem(&slots, &line_index);

	if (!line)
		return NULL;
	*index = first_upstream + line->upstream[slot % SLOTS_PER_LINE];
	return bpf_map_lookup_elem(&upstreams, index);
}

/* Somebody wants it to be left out: the configuration, unless `drain` and `enable` say otherwise. */
static __always_inline bool is_drained(const struct upstream *upstream)
{
	__u32 index = upstream->id / OVERRIDES_PER_WORD, shift = upstream->id % OVERRIDES_PER_WORD * 2;
	const __u64 *word = bpf_map_lookup_elem(&overrides, &index);
	__u32 override = word ? *word >> shift & 3 : OVERRIDE_NONE;

	return override == OVERRIDE_NONE ? upstream->drained : override == OVERRIDE_DRAINED;
}

#define REHASHED_CHOICES 16
#define NEIGHBOUR_CHOICES 64

enum usable {
	USABLE_NOT, /* drained, or not there */
	USABLE_DOWN,
	USABLE,
};

/* An upstream that could be selected, in one number: index plus one, and enum usable in the lowest bits. */
#define CANDIDATE(index, usable) (((index) + 1) << 2 | (usable))
#define CANDIDATE_USABLE(candidate) ((candidate)&3)

/* The candidate in a slot, if it is better than the one that there is. */
__noinline __u32 better(__u32 candidate, __u32 slot, __u32 first_upstream, __u32 skips_down)
{
	const struct upstream *upstream;
	__u32 index = 0, usable = USABLE;

	upstream = slot_upstream(slot, first_upstream, &index);
	if (!upstream || is_drained(upstream))
		return candidate;
	if (skips_down && is_down(upstream))
		usable = USABLE_DOWN;
	return usable > CANDIDATE_USABLE(candidate) ? CANDIDATE(index, usable) : candidate;
}

/*
 * The first of the key's other choices that is neither drained nor down: spread by hashing, so that nobody
 * takes over a whole neighbour's flows, then slot by slot, so that a few are found among many. Where all
 * are down, the first that is not drained. A candidate; 0 where all are drained.
 */
__noinline __u32 other_choice(__u32 first_slot, __u32 slots, __u32 first_upstream, __u32 key,
			      __u32 skips_down)
{
	__u32 candidate = USABLE_NOT, choice;

	for (choice = 0; choice < REHASHED_CHOICES + NEIGHBOUR_CHOICES; choice++) {
		if (choice < REHASHED_CHOICES)
			key = (key ^ key >> 15) * 0x9e3779b1 + choice;
		else
			key++;
		candidate = better(candidate, first_slot + key % slots, first_upstream, skips_down);
		if (CANDIDATE_USABLE(candidate) == USABLE)
			break;
	}
	return candidate;
}

/* The index of the upstream that a key selects, plus one; 0: none. */
static __always_inline __u32 select(const struct rule *rule, __u32 key)
{
	const struct upstream *upstream;
	__u32 slot = rule->slots > 1 ? key % rule->slots : 0, index = 0, other;
	bool skips_down = rule->flags & RULE_SKIPS_DOWN;

	upstream = slot_upstream(rule->first_slot + slot, rule->first_upstream, &index);
	if (!upstream)
		return 0;
	if (is_drained(upstream))
		return other_choice(rule->first_slot, rule->slots, rule->first_upstream, key, skips_down) >>
		       2;
	if (skips_down && is_down(upstream)) {
		other = other_choice(rule->first_slot, rule->slots, rule->first_upstream, key, true);
		return CANDIDATE_USABLE(other) == USABLE ? other >> 2 : index + 1;
	}
	return index + 1;
}

/* Every `sample`-th packet; all CPUs count together. */
static __always_inline bool is_sampled(__u32 index, __u32 sample)
{
	struct sampled *sampled = bpf_map_lookup_elem(&samples, &index);
	bool due;

	if (!sampled)
		return true;
	bpf_spin_lock(&sampled->lock);
	due = sampled->packets == 0;
	if (!features.asking && ++sampled->packets >= sample)
		sampled->packets = 0;
	bpf_spin_unlock(&sampled->lock);
	return due;
}

/* Whether a receiver gets packets at all. */
__noinline __u32 receives(__u32 index)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &index);

	return upstream && !is_drained(upstream);
}

/* Whether it is to get this one. */
__noinline __u32 is_due(__u32 index)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &index);

	return upstream && !is_drained(upstream) &&
	       (upstream->sample <= 1 || is_sampled(index, upstream->sample));
}

/* The receivers that are to get this packet, a bit each. */
__noinline __u64 due_receivers(__u32 first, __u32 receivers)
{
	__u64 due = 0;
	__u32 i;

	for (i = 0; i < MOST_RECEIVERS && i < receivers; i++)
		due |= (__u64)is_due(first + i) << i;
	return due;
}

/* Whether any of them gets packets at all. */
__noinline __u32 has_receivers(__u32 first, __u32 receivers)
{
	__u32 i, some = 0;

	for (i = 0; i < MOST_RECEIVERS && i < receivers; i++)
		some |= receives(first + i);
	return some;
}

#endif
