/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Counts packets by sender, for rules with `senders`. A sender that a rule has heard for long keeps its
 * place; others replace one another. Nothing is locked: CPUs that give a place away at once may leave half of
 * either address there, which matches no sender, and user space knows it by its tag.
 */
#ifndef UDPLB_SENDERS_H
#define UDPLB_SENDERS_H

/* Willingness to give a place to another sender, from the least to the most. */
enum sender_claim {
	CLAIM_NEVER,
	CLAIM_SILENT, /* known, and silent for longer than it was heard */
	CLAIM_STRANGER,
	CLAIM_FREE,
};

/* Returns packets and bytes in one number: packets in the upper half. */
static __always_inline __u64 sender_size(struct counter size)
{
	return size.packets << 32 | (__u32)size.bytes;
}

/* Returns two words of an IPv6 address as they are in struct sender. */
static __always_inline __u64 address_word(const __be32 *words)
{
	return (__u64)words[0] << 32 | words[1];
}

static __always_inline __u32 sender_bits(__u32 table)
{
	return table >> TABLE_BITS_SHIFT & TABLE_BITS;
}

/* Returns the tag of a sender in a table. */
static __always_inline __u32 sender_tag(__u32 table, __u64 hash)
{
	return ((__u32)hash & ~SENDER_FLAGS) | SENDER_USED | (table & TABLE_REFUSED ? SENDER_REFUSED : 0);
}

static __always_inline __u32 first_sender_bucket(__u32 table, __u64 hash)
{
	return hash >> 32 >> (32 - sender_bits(table));
}

static __always_inline __u32 second_sender_bucket(__u32 table, __u64 hash)
{
	return hash >> 32 & ((1U << sender_bits(table)) - 1);
}

static __always_inline struct sender_bucket *sender_bucket_at(__u32 table, __u32 bucket)
{
	__u32 index = (table & TABLE_INDEX) - 1;
	void *buckets;

	if (!EXTRA(sender_tables))
		return NULL;
	buckets = bpf_map_lookup_elem(&sender_tables, &index);
	return buckets ? bpf_map_lookup_elem(buckets, &bucket) : NULL;
}

/* Adds packets to a sender if it is in the bucket. Returns false if it is not. */
static __always_inline bool add_to_sender(struct sender_bucket *bucket, __u32 tag, __u64 high, __u64 low,
					  __u64 size)
{
	struct sender *sender;
	__u32 now, way;

#pragma unroll
	for (way = 0; way < SENDER_WAYS; way++) {
		sender = &bucket->senders[way];
		if (bucket->tags[way] != tag || sender->low != low || sender->high != high)
			continue;
		__sync_fetch_and_add(&sender->packets, size >> 32);
		__sync_fetch_and_add(&sender->bytes, (__u32)size);
		now = beats();
		/* seldom, since all senders of a bucket share the line */
		if (bucket->last[way] != now)
			bucket->last[way] = now;
		return true;
	}
	return false;
}

/* Returns what beats_since() does, without a branch, see claim_sender(). */
static __always_inline __u64 beats_between(__u32 since, __u32 until)
{
	__s64 age = (__s32)(until - since), negative = age >> 63;

	barrier_var(negative);
	return age & ~negative;
}

/* Returns how willingly a place is given away: enum sender_claim, and below it the time of silence in beats.
 */
static __always_inline __u64 sender_claim(const struct sender_bucket *bucket, __u32 way, __u32 now)
{
	__u64 heard = beats_between(bucket->first[way], bucket->last[way]);
	__u64 silence = beats_between(bucket->last[way], now);
	__u64 silent = less_than(heard, silence);
	__u64 stranger = less_than(bucket->senders[way].packets, sender_settings.known_packets) |
			 less_than(heard, sender_settings.known_time);
	__u64 free = less_than(bucket->tags[way], 1) | less_than(sender_settings.kept_time, silence);
	__u64 claim = silent * CLAIM_SILENT;

	claim += stranger * (CLAIM_STRANGER - claim);
	claim += free * (CLAIM_FREE - claim);
	return claim << 32 | silence;
}

/*
 * Returns the place in a bucket that is given away most willingly: its claim, and in the lowest bits the way.
 * Branch-free: the verifier would explore every combination of eight places.
 */
__noinline __u64 claim_sender(__u32 table, __u32 index, __u32 now)
{
	const struct sender_bucket *bucket = sender_bucket_at(table, index);
	__u64 best = 0, claim;
	__u32 way;

	if (!bucket)
		return 0;
	for (way = 0; way < SENDER_WAYS; way++) {
		claim = sender_claim(bucket, way, now) * SENDER_WAYS + way;
		best += less_than(best, claim) * (claim - best);
	}
	return best;
}

/* Gives a new sender a place, unless all in its buckets are kept. */
__noinline __u32 insert_sender(__u32 table, __u64 hash, __u64 high, __u64 low, __u64 size)
{
	__u32 first = first_sender_bucket(table, hash), second = second_sender_bucket(table, hash);
	__u32 now = beats(), way;
	__u64 claim = claim_sender(table, first, now), other = claim_sender(table, second, now);
	struct sender_bucket *bucket;
	struct sender *sender;

	if (other > claim) {
		claim = other;
		first = second;
	}
	bucket = sender_bucket_at(table, first);
	if (!bucket || claim / SENDER_WAYS >> 32 == CLAIM_NEVER)
		return 0;
	way = claim % SENDER_WAYS;
	sender = &bucket->senders[way];
	bucket->tags[way] = 0;
	barrier();
	bucket->first[way] = now;
	bucket->last[way] = now;
	sender->high = high;
	sender->low = low;
	sender->packets = size >> 32;
	sender->bytes = (__u32)size;
	barrier();
	bucket->tags[way] = sender_tag(table, hash);
	return 0;
}

/*
 * Counts packets of a sender in a table, `table` as in struct rule, not 0. The address is as in struct
 * sender. Global functions, from here on: all programs call them, and the verifier explores them once.
 */
__noinline __u32 count_sender(__u32 table, __u64 high, __u64 low, __u64 size)
{
	const struct sequences *sequences = get_sequences();
	struct sender_bucket *bucket;
	__u64 hash;
	__u32 tag;

	if (!EXTRA(sender_tables) || !sequences)
		return 0;
	hash = mix(mix(sequences->secret[1] ^ high) ^ low);
	tag = sender_tag(table, hash);
	bucket = sender_bucket_at(table, first_sender_bucket(table, hash));
	if (!bucket || add_to_sender(bucket, tag, high, low, size))
		return 0;
	bucket = sender_bucket_at(table, second_sender_bucket(table, hash));
	if (!bucket || add_to_sender(bucket, tag, high, low, size))
		return 0;
	return insert_sender(table, hash, high, low, size);
}

/* Counts packets of a sender by its address in a header. */
static __always_inline void count_address(__u32 table, const __be32 *words, __u64 size, const bool ipv6)
{
	if (ipv6)
		count_sender(table, address_word(words), address_word(words + 2), size);
	else
		count_sender(table, 0, words[0], size);
}

/* Counts a packet of the sender in its headers; without a table (0) it is not counted. */
static __always_inline void count_sender_of(const struct pkt *pkt, __u32 table, __u64 size)
{
	if (likely(!table) || !EXTRA(sender_tables))
		return;
	if (pkt->is_ipv6)
		count_address(table, pkt->ip6->saddr.in6_u.u6_addr32, size, true);
	else
		count_address(table, &pkt->ip->saddr, size, false);
}

/* Counts a plain packet in a frame of so many bytes, see count_sender_of(). */
static __always_inline void count_plain_sender(const struct pkt *pkt, __u32 table, __u64 bytes)
{
	struct counter one = {.packets = 1, .bytes = bytes};

	count_sender_of(pkt, table, sender_size(one));
}

/* Counts a packet of a rule's sender, behind an Ethernet header without VLAN tags. */
__noinline __u32 count_rule_sender(struct __sk_buff *skb, __u32 packed, __u32 table)
{
	struct pkt pkt = pkt_of(packed);

	if (EXTRA(sender_tables) && pkt_locate(skb, &pkt))
		count_sender_of(&pkt, table, sender_size(counted_size(skb, packed, skb->len)));
	return 0;
}

static __always_inline void count_refused_by(struct __sk_buff *skb, __u32 ip, __u32 udp, const bool ipv6)
{
	__u32 length = ipv6 ? sizeof(struct in6_addr) : sizeof(__be32);
	__u32 saddr = ip + (ipv6 ? offsetof(struct ipv6hdr, saddr) : offsetof(struct iphdr, saddr));
	__u32 packed = pkt_pack(ipv6 ? PKT_F_IPV6 : 0, 0, udp - ip + sizeof(struct ethhdr));
	struct counter size = counted_size(skb, packed, skb->len - ip + sizeof(struct ethhdr));
	__be32 source[4], destination[4];
	const struct rule *rule;
	__be16 port;

	if (bpf_skb_load_bytes(skb, saddr, source, length) ||
	    bpf_skb_load_bytes(skb, saddr + length, destination, length) ||
	    bpf_skb_load_bytes(skb, udp + offsetof(struct udphdr, dest), &port, sizeof(port)))
		return;
	rule = key_rule(destination, port, ipv6);
	if (rule && rule->refused_table)
		count_address(rule->refused_table, source, sender_size(size), ipv6);
}

/*
 * Counts a datagram that no rule takes, if its key has rules for other senders. Offsets are those of the IP
 * header and of the UDP header in the frame as it arrived.
 */
__noinline __u32 count_refused(struct __sk_buff *skb, __u32 ip, __u32 udp, __u32 ipv6)
{
	if (!EXTRA(sender_tables) || !EXTRA(senders))
		return 0;
	if (features.ipv6 && ipv6)
		count_refused_by(skb, ip, udp, true);
	else
		count_refused_by(skb, ip, udp, false);
	return 0;
}

#endif
