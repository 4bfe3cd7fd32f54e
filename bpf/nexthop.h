/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The way to an upstream: what user space vouches for, what the kernel's routing says, what was known once.
 */
#ifndef UDPLB_NEXTHOP_H
#define UDPLB_NEXTHOP_H

/* Where a packet goes: what of it is known depends on the verdict beside it. */
struct way {
	__u8 frame[2 * ETH_ALEN] __attribute__((aligned(8))); /* as they stand in it: destination, source */
	__u32 ifindex;
	__u32 family;
	__be32 gateway[4];
	__u16 mtu; /* 0: unknown */
};

/* What a packet is sent with. Not on the stack, of which all functions on the way have 512 bytes together. */
struct sending {
	struct label label;
	struct way way;
	struct bpf_fib_lookup fib;
	struct bpf_redir_neigh neighbour;
	struct headers original;
	volatile enum checksum checksum; /* read each time: the verifier would go on once for each of them */
	__u32 csum;			 /* what was added to skb->csum */
};

/* One for each CPU: nothing that a packet is sent to comes back in before send() has ended. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sending);
} sendings SEC(".maps");

static __always_inline struct sending *get_sending(void)
{
	const __u32 only = 0;

	return bpf_map_lookup_elem(&sendings, &only);
}

/* Half-word by half-word, as the stack is aligned: a plain copy would go byte by byte. */
static __always_inline void copy_mac(void *to, const void *from)
{
	*(__u16 *)to = *(const __u16 *)from;
	*(__u16 *)(to + 2) = *(const __u16 *)(from + 2);
	*(__u16 *)(to + 4) = *(const __u16 *)(from + 4);
}

static __always_inline bool is_no_mac(const __u8 *mac)
{
	const __u16 *words = (const void *)mac;

	return !(words[0] | words[1] | words[2]);
}

static __always_inline bool is_same_address(const __be32 *one, const __be32 *other)
{
	return !((one[0] ^ other[0]) | (one[1] ^ other[1]) | (one[2] ^ other[2]) | (one[3] ^ other[3]));
}

/* RFC 4291, section 2.5.6: of one link, which the routing table does not say. */
static __always_inline bool is_link_local(const __be32 *address)
{
	return (address[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* Of one host, and not to itself. */
static __always_inline bool is_unicast_ipv6(const __be32 *address)
{
	return (address[0] & bpf_htonl(0xff000000)) != bpf_htonl(0xff000000) &&
	       (address[0] | address[1] | address[2] | (address[3] & ~bpf_htonl(1)));
}

/* What no router sends on (RFC 4291, sections 2.5.2, 2.5.3, 2.5.6 and 2.7); the kernel does not route it. */
static __always_inline bool stays_here(const struct label *label)
{
	return !is_unicast_ipv6(label->source) ||
	       (is_link_local(label->source) && !is_link_local(label->destination));
}

static __always_inline const struct nexthop_slot *nexthop_slot(const struct upstream *upstream)
{
	__u32 chunk = upstream->id / NEXTHOPS_PER_CHUNK, index = upstream->id % NEXTHOPS_PER_CHUNK;
	void *inner = bpf_map_lookup_elem(&nexthops, &chunk);

	return inner ? bpf_map_lookup_elem(inner, &index) : NULL;
}

static __always_inline __u32 sequence_of(const struct nexthop_slot *slot)
{
	return *(const volatile __u32 *)&slot->sequence;
}

/* The entry that is in use, if it is this upstream's. */
static __always_inline const struct nexthop *known_of(const struct nexthop_slot *slot, __u32 sequence,
						      const struct upstream *upstream)
{
	const struct nexthop *known = &slot->copies[sequence & 1];

	if (features.ipv6 ? !is_same_address(known->address, upstream->address)
			  : known->address[0] != upstream->address[0])
		return NULL;
	return known;
}

/* Somebody lives who takes back what is no longer so. */
static __always_inline bool lease_holds(void)
{
	const __u32 only = 0;
	const struct heartbeat *last = bpf_map_lookup_elem(&heartbeat, &only);

	return last && (__s64)(last->until - bpf_jiffies64()) > 0;
}

/* Whether an upstream is known not to answer. */
static __always_inline bool is_down(const struct upstream *upstream)
{
	const struct nexthop_slot *slot = nexthop_slot(upstream);
	const struct nexthop *known;

	if (!slot || !(known = known_of(slot, sequence_of(slot), upstream)))
		return false;
	return known->health == HEALTH_DOWN && lease_holds();
}

/* This host's own address on the way; false where it is not known. */
static __always_inline bool egress_address(const struct upstream *upstream, __be32 *address)
{
	const struct nexthop_slot *slot = nexthop_slot(upstream);
	const struct nexthop *known;
	__u32 sequence;

	if (!slot)
		return false;
	sequence = sequence_of(slot);
	known = known_of(slot, sequence, upstream);
	if (!known)
		return false;
	__builtin_memcpy(address, known->egress, sizeof(known->egress));
	return (address[0] | address[1] | address[2] | address[3]) && sequence_of(slot) == sequence;
}

/* The way that user space vouches for; false where it does not, or no longer. */
static __always_inline bool leased_way(const struct upstream *upstream, struct way *way)
{
	const struct nexthop_slot *slot;
	const struct nexthop *known;
	__u32 sequence;

	if (!lease_holds() || !(slot = nexthop_slot(upstream)))
		return false;
	sequence = sequence_of(slot);
	known = known_of(slot, sequence, upstream);
	if (!known || known->macs < MACS_FRESH || !known->ifindex)
		return false;
	way->ifindex = known->ifindex;
	copy_macs(way->frame, known->destination);
	way->mtu = known->mtu;
	/* two writes since: what was read may be a mixture */
	return sequence_of(slot) == sequence;
}

/*
 * What user space resolved once, where the kernel's routing knows no MAC address (`routed`:
 * `way` has interface and gateway) or does not route at all.
 */
static __always_inline enum verdict expired_way(const struct upstream *upstream, struct way *way, bool routed)
{
	const enum verdict without = routed ? VERDICT_NO_NEIGHBOUR : VERDICT_NO_ROUTE;
	const struct nexthop_slot *slot = nexthop_slot(upstream);
	const struct nexthop *known;
	__u32 sequence;

	if (!slot)
		return without;
	sequence = sequence_of(slot);
	known = known_of(slot, sequence, upstream);
	if (!known || !known->ifindex)
		return without;
	if (routed && known->ifindex != way->ifindex)
		return without;
	if (known->macs == MACS_NONE) {
		way->ifindex = known->ifindex;
		way->mtu = known->mtu;
		return sequence_of(slot) == sequence ? VERDICT_FORWARDED : VERDICT_NO_NEIGHBOUR;
	}
	if (routed && !is_same_address(known->gateway, way->gateway))
		return without;
	way->ifindex = known->ifindex;
	way->family = known->family;
	__builtin_memcpy(way->gateway, known->gateway, sizeof(way->gateway));
	copy_macs(way->frame, known->destination);
	way->mtu = known->mtu;
	if (known->macs == MACS_UNKNOWN || sequence_of(slot) != sequence)
		return VERDICT_NO_NEIGHBOUR;
	return VERDICT_STALE_NEIGHBOUR;
}

/* Of the route, as user space found it; 0: unknown. */
static __always_inline __u16 mtu_of(const struct upstream *upstream)
{
	const struct nexthop_slot *slot = nexthop_slot(upstream);
	const struct nexthop *known = slot ? known_of(slot, sequence_of(slot), upstream) : NULL;

	return known ? known->mtu : 0;
}

/* Length of the IP packet that goes out: of a segment where the device or the kernel cuts it up. */
static __always_inline __u32 ip_length(struct __sk_buff *skb, __u32 layout, const struct packet *packet)
{
	if (skb->gso_size)
		return segment_headers(skb, layout) - sizeof(struct ethhdr) + skb->gso_size;
	if (packet->is_ipv6)
		return sizeof(struct ipv6hdr) + bpf_ntohs(packet->ip6->payload_len);
	return bpf_ntohs(packet->ip->tot_len);
}

/* What the kernel's routing is asked for a packet of that length. */
static __always_inline void write_question(struct __sk_buff *skb, const struct packet *packet,
					   const struct label *label, __u32 length,
					   struct bpf_fib_lookup *fib)
{
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->family = AF_INET;
	fib->l4_protocol = IPPROTO_UDP;
	/* without it, or with the whole of a GSO packet, the kernel would judge by another length or MTU */
	fib->tot_len = length;
	fib->ifindex = skb->ifindex;
	if (packet->has_udp) {
		fib->sport = packet->udp->source;
		fib->dport = label->port ?: packet->udp->dest;
	}
	if (packet->is_ipv6) {
		fib->family = AF_INET6;
		fib->flowinfo = *(__be32 *)packet->ip6 & bpf_htonl(0x0fffffff);
		__builtin_memcpy(fib->ipv6_src, label->source, sizeof(fib->ipv6_src));
		__builtin_memcpy(fib->ipv6_dst, label->destination, sizeof(fib->ipv6_dst));
	} else {
		fib->tos = packet->ip->tos;
		fib->ipv4_src = label->source[0];
		/* .ipv4_dst, and zeroes behind it: the gateway is compared as a whole */
		fib->ipv6_dst[0] = label->destination[0];
	}
}

/* The way that the kernel's routing knew: BPF_FIB_LKUP_RET_SUCCESS. */
static __always_inline void take_way(struct way *way, const struct bpf_fib_lookup *fib)
{
	way->ifindex = fib->ifindex;
	copy_mac(way->frame, fib->dmac);
	copy_mac(way->frame + ETH_ALEN, fib->smac);
	way->mtu = fib->mtu_result;
}

/*
 * What is done where the kernel's routing has no way; `result` is what it said. As next_hop(); in a function
 * by itself because the verifier would go on once for each of its ends.
 */
__noinline __u32 find_way(__u32 index, __u32 result, __u32 length)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &index);
	struct sending *sending = get_sending();
	const struct bpf_fib_lookup *fib;
	struct way *way;
	__u16 known;

	if (!upstream || !sending)
		return VERDICT_NO_ROUTE;
	way = &sending->way;
	fib = &sending->fib;
	__builtin_memset(way, 0, sizeof(*way));
	switch (result) {
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		/* takes the place of tot_len, from 5.12 on */
		known = fib->mtu_result < length ? fib->mtu_result : mtu_of(upstream);
		way->mtu = known < length ? known : 0;
		return VERDICT_MTU;
	case BPF_FIB_LKUP_RET_SUCCESS: /* before 6.3, while the kernel still asks for the neighbour */
	case BPF_FIB_LKUP_RET_NO_NEIGH:
		way->ifindex = fib->ifindex;
		way->family = fib->family;
		__builtin_memcpy(way->gateway, fib->ipv6_dst, sizeof(way->gateway));
		return expired_way(upstream, way, true);
	case BPF_FIB_LKUP_RET_FWD_DISABLED:
		return expired_way(upstream, way, false);
	default:
		return VERDICT_NO_ROUTE;
	}
}

/* The way that the kernel's routing says, or else one that was known once. */
static __always_inline enum verdict routed_way(struct __sk_buff *skb, const struct packet *packet,
					       __u32 index, __u32 length, struct sending *sending)
{
	struct bpf_fib_lookup *fib = &sending->fib;
	int result = BPF_FIB_LKUP_RET_FWD_DISABLED;

	write_question(skb, packet, &sending->label, length, fib);
	/* the link of a link-local address only the configuration knows */
	if (!packet->is_ipv6 || !is_link_local(fib->ipv6_dst))
		result = bpf_fib_lookup(skb, fib, sizeof(*fib), 0);
	if (result != BPF_FIB_LKUP_RET_SUCCESS || is_no_mac(fib->dmac))
		return find_way(index, result, length);
	take_way(&sending->way, fib);
	return VERDICT_FORWARDED;
}

/*
 * Fills `way` for the upstream with that index. MAC addresses are there with VERDICT_FORWARDED and
 * VERDICT_STALE_NEIGHBOUR, unless the interface has none, interface and gateway with VERDICT_NO_NEIGHBOUR
 * too, and nothing with any other.
 */
static __always_inline enum verdict next_hop(struct __sk_buff *skb, __u32 layout, const struct packet *packet,
					     const struct upstream *upstream, __u32 index,
					     struct sending *sending)
{
	struct way *way = &sending->way;
	__u32 length = ip_length(skb, layout, packet);
	enum verdict verdict = VERDICT_FORWARDED;

	if (packet->is_ipv6 && stays_here(&sending->label))
		return VERDICT_NO_ROUTE;
	if (!leased_way(upstream, way))
		verdict = routed_way(skb, packet, index, length, sending);
	return verdict != VERDICT_NO_ROUTE && way->mtu && length > way->mtu ? VERDICT_MTU : verdict;
}

#endif
