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
	__u16 mtu;	      /* 0: unknown */
	bool asks;	      /* it is time to ask the kernel for the MTU of the path */
	bool resolved;	      /* the frame has the MAC addresses, or needs none */
	enum verdict verdict; /* of a packet that fits */
};

/* What a packet is sent with. Not on the stack, of which all functions on the way have 512 bytes together. */
struct sending {
	__u32 upstream; /* id */
	bool own;	/* the source is this host's address on the way that user space resolved */
	struct label label;
	struct way way;
	struct bpf_fib_lookup fib;
	struct bpf_redir_neigh neighbour;
	struct headers original;
	__u32 pieces;		     /* fragments that the packet is cut into; 0: it is not */
	__u32 cb[5];		     /* of the skb, as it came */
	__u32 options[MOST_OPTIONS]; /* of the IP header of a packet that is cut */
	__u32 option_end;	     /* of the one that is looked at */
	__u32 option_blank;	     /* it is to be replaced */
	__u8 shifted[SHIFTED];
	volatile enum checksum checksum; /* read each time: the verifier would go on once for each of them */
	__u32 csum;			 /* what was added to skb->csum */
	/* of the walk through an IPv4 header's options, and read each time, too: where, and its verdict */
	volatile __u32 option, goes_on;
	__u32 martians; /* the packet's rule forwards any source */
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

#include "neighbour.h"

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

/* Returns true for a packet that goes out, or to the kernel's neighbour table. */
static __always_inline bool is_sent(enum verdict verdict)
{
	return verdict == VERDICT_FORWARDED || verdict == VERDICT_STALE_NEIGHBOUR ||
	       verdict == VERDICT_UNRESOLVED;
}

static __always_inline bool is_same_mac(const void *one, const void *other)
{
	const __u16 *ones = one, *others = other;

	return !((ones[0] ^ others[0]) | (ones[1] ^ others[1]) | (ones[2] ^ others[2]));
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

/*
 * Returns true for a packet that no router sends on (RFC 4291, sections 2.5.2, 2.5.3, 2.5.6 and 2.7) and the
 * kernel does not route, and for one that would be from its receiver, which drops it.
 */
__noinline __u32 leaves_as_martian(__u32 layout)
{
	struct sending *sending = get_sending();
	const struct label *label;

	if (!sending)
		return true;
	label = &sending->label;
	if (!(layout & LAYOUT_IPV6))
		return !sending->martians && label->source[0] == label->destination[0];
	return !is_unicast_ipv6(label->source) ||
	       (is_link_local(label->source) && !is_link_local(label->destination)) ||
	       (!sending->martians && is_same_address(label->source, label->destination));
}

static __always_inline struct nexthop_slot *nexthop_slot(__u32 upstream)
{
	__u32 chunk = upstream / NEXTHOPS_PER_CHUNK, index = upstream % NEXTHOPS_PER_CHUNK;
	void *inner = bpf_map_lookup_elem(&nexthops, &chunk);

	return inner ? bpf_map_lookup_elem(inner, &index) : NULL;
}

static __always_inline __u32 sequence_of(const struct nexthop_slot *slot)
{
	return *(const volatile __u32 *)&slot->sequence;
}

/* The entry that is in use, if it is for this upstream's address. */
static __always_inline const struct nexthop *known_of(const struct nexthop_slot *slot, __u32 sequence,
						      const __be32 *address)
{
	const struct nexthop *known = &slot->copies[sequence & 1];

	if (features.ipv6 ? !is_same_address(known->address, address) : known->address[0] != address[0])
		return NULL;
	return known;
}

/* Whether an upstream is known not to answer. */
static __always_inline bool is_down(const struct upstream *upstream)
{
	const struct nexthop_slot *slot = nexthop_slot(upstream->id);
	const struct nexthop *known;

	if (!slot || !(known = known_of(slot, sequence_of(slot), upstream->address)))
		return false;
	return known->health == HEALTH_DOWN && lease_holds();
}

/* This host's own address on the way; false where it is not known. */
static __always_inline bool egress_address(const struct upstream *upstream, __be32 *address)
{
	const struct nexthop_slot *slot = nexthop_slot(upstream->id);
	const struct nexthop *known;
	__u32 sequence;

	if (!slot)
		return false;
	sequence = sequence_of(slot);
	known = known_of(slot, sequence, upstream->address);
	if (!known)
		return false;
	__builtin_memcpy(address, known->egress, sizeof(known->egress));
	return (address[0] | address[1] | address[2] | address[3]) && sequence_of(slot) == sequence;
}

enum leased {
	LEASED_NOTHING, /* or no longer */
	LEASED_DOWN,	/* there is a next hop, which does not answer */
	LEASED_WAY,
};

/* Takes the way that arpd vouches for. */
static __always_inline enum leased leased_way(struct sending *sending)
{
	struct way *way = &sending->way;
	const struct nexthop_slot *slot;
	const struct nexthop *known;
	__u32 sequence;

	if (!lease_holds() || !(slot = nexthop_slot(sending->upstream)))
		return LEASED_NOTHING;
	sequence = sequence_of(slot);
	known = known_of(slot, sequence, sending->label.destination);
	if (!known || !known->ifindex)
		return LEASED_NOTHING;
	if (known->health == HEALTH_DOWN)
		return LEASED_DOWN;
	if (known->macs < MACS_FRESH)
		return LEASED_NOTHING;
	way->ifindex = known->ifindex;
	copy_macs(way->frame, known->destination);
	way->mtu = known->mtu;
	way->resolved = true;
	if (features.asking)
		__builtin_memcpy(way->gateway, known->gateway, sizeof(way->gateway));
	way->asks = age(slot->asked) >= ASKED_SECONDS * features.ticks_per_second;
	/* two writes since: what was read may be a mixture */
	return sequence_of(slot) == sequence ? LEASED_WAY : LEASED_NOTHING;
}

/*
 * Takes interface and gateway that user space resolved, where the kernel does not route for this interface.
 * Only the kernel's neighbour table knows whether the gateway answers.
 */
static __always_inline enum verdict known_way(struct __sk_buff *skb, const struct sending *sending,
					      struct way *way)
{
	const struct nexthop_slot *slot = nexthop_slot(sending->upstream);
	enum verdict verdict = VERDICT_STALE_NEIGHBOUR;
	const struct nexthop *known;
	__u32 sequence, gateway;

	if (!slot)
		return VERDICT_NO_ROUTE;
	sequence = sequence_of(slot);
	known = known_of(slot, sequence, sending->label.destination);
	if (!known || !known->ifindex)
		return VERDICT_NO_ROUTE;
	way->ifindex = known->ifindex;
	way->family = known->family;
	__builtin_memcpy(way->gateway, known->gateway, sizeof(way->gateway));
	way->mtu = known->mtu;
	way->resolved = known->macs == MACS_NONE;
	if (known->macs == MACS_UNKNOWN)
		verdict = VERDICT_UNRESOLVED;
	if (sequence_of(slot) != sequence)
		return VERDICT_NO_NEIGHBOUR;
	if (way->resolved)
		return VERDICT_FORWARDED;
	gateway = is_gateway_known(skb);
	if (gateway == KNOWN_NOT_READABLE)
		return verdict;
	return gateway == KNOWN_VALID ? VERDICT_FORWARDED : VERDICT_UNRESOLVED;
}

/* Returns the entry of user space if it leaves by that interface; 0: by any. */
static __always_inline const struct nexthop *known_on(const struct sending *sending, __u32 ifindex)
{
	const struct nexthop_slot *slot = nexthop_slot(sending->upstream);
	const struct nexthop *known =
		slot ? known_of(slot, sequence_of(slot), sending->label.destination) : NULL;

	return known && (!ifindex || known->ifindex == ifindex) ? known : NULL;
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
	way->resolved = true;
	if (features.asking)
		__builtin_memcpy(way->gateway, fib->ipv6_dst, sizeof(way->gateway));
}

/*
 * Returns true for a path that leaves by another interface than the one whose address the packet has. Before
 * 6.15 the kernel hashes a flow over several paths whatever its source is.
 */
static __always_inline bool is_other_path(const struct sending *sending, int result)
{
	const struct nexthop *known;

	if (!sending->own || (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH))
		return false;
	known = known_on(sending, 0);
	return known && known->ifindex != sending->fib.ifindex;
}

/* Takes the way to a neighbour that the kernel knows no MAC address of; there may be none to know. */
static __always_inline enum verdict gateway_way(const struct sending *sending, struct way *way)
{
	const struct bpf_fib_lookup *fib = &sending->fib;
	const struct nexthop *known = known_on(sending, fib->ifindex);

	way->ifindex = fib->ifindex;
	way->family = fib->family;
	__builtin_memcpy(way->gateway, fib->ipv6_dst, sizeof(way->gateway));
	if (!known)
		return VERDICT_UNRESOLVED;
	way->mtu = known->mtu;
	way->resolved = known->macs == MACS_NONE;
	return way->resolved ? VERDICT_FORWARDED : VERDICT_UNRESOLVED;
}

/* The way of a packet that fits, where a larger one was asked for. */
static __always_inline enum verdict way_that_fits(struct __sk_buff *skb, struct sending *sending, __u16 mtu)
{
	struct bpf_fib_lookup *fib = &sending->fib;
	int result;

	fib->tot_len = mtu;
	result = bpf_fib_lookup(skb, fib, sizeof(*fib), 0);
	if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH)
		return VERDICT_NO_ROUTE;
	if (is_other_path(sending, result))
		return known_way(skb, sending, &sending->way);
	if (result == BPF_FIB_LKUP_RET_NO_NEIGH || is_no_mac(fib->dmac))
		return gateway_way(sending, &sending->way);
	take_way(&sending->way, fib);
	return VERDICT_FORWARDED;
}

/* The MTU that the kernel said takes the place of tot_len, from 5.12 on. Returns 0 where it is not known. */
static __always_inline __u16 mtu_that_fits(const struct sending *sending, __u32 length)
{
	const struct nexthop *known;
	__u16 mtu = sending->fib.mtu_result;

	if (mtu >= length) {
		known = known_on(sending, 0);
		mtu = known ? known->mtu : 0;
	}
	return mtu < length ? mtu : 0;
}

/*
 * What is done where the kernel's routing has no way; `result` is what it said. As next_hop(); in a function
 * by itself because the verifier would go on once for each of its ends.
 */
__noinline __u32 find_way(struct __sk_buff *skb, __u32 result, __u32 length)
{
	struct sending *sending = get_sending();
	struct way *way;
	__u16 mtu;

	if (!sending)
		return VERDICT_NO_ROUTE;
	way = &sending->way;
	__builtin_memset(way, 0, sizeof(*way));
	switch (result) {
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		mtu = mtu_that_fits(sending, length);
		way->verdict = VERDICT_NO_ROUTE;
		if (mtu && sending->fib.family == AF_INET)
			way->verdict = way_that_fits(skb, sending, mtu);
		way->mtu = mtu;
		return VERDICT_MTU;
	case BPF_FIB_LKUP_RET_SUCCESS: /* before 6.3, while the kernel still asks for the neighbour */
	case BPF_FIB_LKUP_RET_NO_NEIGH:
		return gateway_way(sending, way);
	case BPF_FIB_LKUP_RET_FWD_DISABLED:
		return known_way(skb, sending, way);
	default:
		return VERDICT_NO_ROUTE;
	}
}

/*
 * Notes what the kernel's routing says of the path, where arpd vouches for the way: what other traffic of
 * this host has learned counts for upstreams too.
 */
__noinline __u32 note_kernel_mtu(__u32 result, __u32 length)
{
	struct sending *sending = get_sending();
	struct nexthop_slot *slot = sending ? nexthop_slot(sending->upstream) : NULL;

	if (!slot)
		return 0;
	slot->asked = bpf_jiffies64();
	if (result == BPF_FIB_LKUP_RET_FRAG_NEEDED && sending->fib.mtu_result < length)
		note_mtu((const struct key_address *)sending->label.destination, sending->fib.mtu_result,
			 2 * ASKED_SECONDS);
	return 0;
}

/* The way that the kernel's routing says, or else the one that user space resolved. */
static __always_inline enum verdict routed_way(struct __sk_buff *skb, const struct packet *packet,
					       __u32 length, bool is_leased, struct sending *sending)
{
	struct bpf_fib_lookup *fib = &sending->fib;
	int result = BPF_FIB_LKUP_RET_FWD_DISABLED;

	write_question(skb, packet, &sending->label, length, fib);
	/* the link of a link-local address only the configuration knows */
	if (!packet->is_ipv6 || !is_link_local(fib->ipv6_dst))
		result = bpf_fib_lookup(skb, fib, sizeof(*fib), 0);
	if (is_leased) {
		note_kernel_mtu(result, length);
		return VERDICT_FORWARDED;
	}
	if (is_other_path(sending, result))
		result = BPF_FIB_LKUP_RET_FWD_DISABLED;
	if (result != BPF_FIB_LKUP_RET_SUCCESS || is_no_mac(fib->dmac))
		return find_way(skb, result, length);
	take_way(&sending->way, fib);
	return VERDICT_FORWARDED;
}

/* Lowers the MTU of the next hop to the one that is noted of the path. */
__noinline __u32 limit_mtu(void)
{
	struct sending *sending = get_sending();
	const struct path_mtu *noted;

	if (!sending)
		return 0;
	noted = bpf_map_lookup_elem(&path_mtus, sending->label.destination);
	if (noted && is_ahead(noted->until) && (!sending->way.mtu || noted->mtu < sending->way.mtu))
		sending->way.mtu = noted->mtu;
	return 0;
}

/*
 * Fills `way` for an IP packet of that length to the upstream in `sending`. MAC addresses are there with
 * VERDICT_FORWARDED, unless the interface has none; interface and gateway with VERDICT_STALE_NEIGHBOUR and
 * VERDICT_UNRESOLVED. With VERDICT_MTU, way->mtu is what fits, if it is known, and way->verdict says the same
 * of a packet that does.
 */
static __always_inline enum verdict next_hop(struct __sk_buff *skb, const struct packet *packet, __u32 length,
					     struct sending *sending)
{
	bool is_large = length > least_mtu(packet->is_ipv6);
	enum leased leased = leased_way(sending);
	enum verdict verdict = VERDICT_FORWARDED;
	struct way *way = &sending->way;

	if (leased == LEASED_DOWN)
		return VERDICT_NO_NEIGHBOUR;
	if (leased == LEASED_NOTHING || (is_large && way->asks))
		verdict = routed_way(skb, packet, length, leased == LEASED_WAY, sending);
	if (verdict != VERDICT_MTU)
		way->verdict = verdict;
	if (is_large && is_any_noted())
		limit_mtu();
	return is_sent(verdict) && way->mtu && length > way->mtu ? VERDICT_MTU : verdict;
}

#endif
