/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Where the fragments of a datagram go: remembered with the first, looked up with the later ones. */
#ifndef UDPLB_FRAGMENTS_H
#define UDPLB_FRAGMENTS_H

#define YOUNG_SECONDS 1	      /* an entry is not evicted */
#define REASSEMBLY_SECONDS 30 /* net.ipv4.ipfrag_time: a receiver waits no longer */

/* By what the fragments of one datagram are told from others (RFC 791, RFC 8200 section 4.5). */
struct datagram {
	__be32 source[4];
	__be32 destination[4];
	__u32 identification;
};

static __always_inline struct tickets *get_tickets(void)
{
	const __u32 only = 0;

	return bpf_map_lookup_elem(&tickets, &only);
}

static __always_inline __u64 fragment_key(const struct datagram *datagram, bool ipv6, __u64 secret)
{
	__u64 key = secret ^ datagram->identification;
	int word;

#pragma unroll
	for (word = 0; word < 4 && (ipv6 || !word); word++)
		key = mix(key ^ ((__u64)datagram->source[word] << 32 | datagram->destination[word]));
	return key;
}

/* Jiffies since, of a clock that goes round. */
static __always_inline __u32 age(__u32 since)
{
	return (__u32)bpf_jiffies64() - since;
}

/*
 * Takes the oldest place; false where even that one is young. Two CPUs may both see a place that is free and
 * take two; the second may then be young, which costs an entry that nobody will miss.
 */
static __always_inline bool take_place(struct tickets *tickets, struct fragmented *entry, __u64 key)
{
	__u32 index = *(const volatile __u32 *)&tickets->place % MOST_FRAGMENTED;
	struct fragment_place *place = bpf_map_lookup_elem(&fragment_ring, &index);
	struct fragmented *old;

	if (!place || (place->used && age(place->since) < YOUNG_SECONDS * features.ticks_per_second))
		return false;
	bpf_spin_lock(&tickets->lock);
	index = tickets->place++ % MOST_FRAGMENTED;
	if (!++tickets->identification)
		tickets->identification = 1;
	entry->identification = tickets->identification;
	bpf_spin_unlock(&tickets->lock);
	place = bpf_map_lookup_elem(&fragment_ring, &index);
	if (!place)
		return false;
	if (place->used) {
		old = bpf_map_lookup_elem(&fragments, &place->key);
		if (old && old->place == index)
			bpf_map_delete_elem(&fragments, &place->key);
	}
	entry->place = index;
	entry->since = bpf_jiffies64();
	place->key = key;
	place->since = entry->since;
	place->used = 1;
	return true;
}

/*
 * Remembers where the later fragments are to go, and gives `entry` an identification; false: no room. One
 * that comes again keeps what it has: its datagram is one.
 */
static __always_inline bool remember(const struct datagram *datagram, bool ipv6, struct fragmented *entry)
{
	struct tickets *tickets = get_tickets();
	const struct fragmented *old;
	__u64 key;

	if (features.asking)
		return true;
	if (!tickets)
		return false;
	key = fragment_key(datagram, ipv6, tickets->secret);
	old = bpf_map_lookup_elem(&fragments, &key);
	if (old && age(old->since) <= REASSEMBLY_SECONDS * features.ticks_per_second) {
		entry->place = old->place;
		entry->since = old->since;
		entry->identification = old->identification;
	} else if (!take_place(tickets, entry, key)) {
		return false;
	}
	return !bpf_map_update_elem(&fragments, &key, entry, BPF_ANY);
}

/* What is remembered of a datagram; NULL: nothing, or of another that had the same identification. */
static __always_inline const struct fragmented *recall(const struct datagram *datagram, bool ipv6)
{
	const struct tickets *tickets = get_tickets();
	const struct fragmented *entry;
	__u64 key;

	if (!tickets)
		return NULL;
	key = fragment_key(datagram, ipv6, tickets->secret);
	entry = bpf_map_lookup_elem(&fragments, &key);
	if (!entry || age(entry->since) > REASSEMBLY_SECONDS * features.ticks_per_second)
		return NULL;
	return entry;
}

#endif
